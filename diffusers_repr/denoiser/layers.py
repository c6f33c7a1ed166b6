"""The layer table: every place that can be read, in execution order, from the meta device."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_repr.denoiser.block_outputs import block_output, registered_outputs
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.hooks import Hooks, clear_hooks, hooks_stay
from diffusers_repr.denoiser.loading import INDEX, check_pipeline_folder, component_class, pipeline_modules
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.components import check_config, check_index, is_component
from diffusers_repr.hub.load import load_json_config
from diffusers_repr.hub.schema import printable
from diffusers_repr.models.weights import build_on_meta
from diffusers_repr.noise import NoiseLevel, NoiseSchedule

Detail = Literal["blocks", "all"]

_TABLES: OrderedDict[Hashable, tuple[Layer, ...]] = OrderedDict()  # by what they depend on, the latest last
_KEPT = 64
_FINDING = threading.Lock()


@dataclass(frozen=True)
class Layer:
    """One place that can be read.

    Attributes:
        path: Full module path, as `capture` takes it.
        kind: `map` (B, C, H, W), of a video (B, C, frames, H, W), or `tokens` (B, N, C).
        channels: C.
        grid: (H, W) of the map, or of the image tokens; (frames, H, W) of a video's.
        stride: Image pixels per cell along the height.
        flops_share: Share of the forward's FLOPs that are spent when the layer is done, 0 to 1.
        text_tokens: Tokens of text that stand before the image's in `tokens`.
        module: Class name.
    """

    path: str
    kind: Literal["map", "tokens"]
    channels: int
    grid: tuple[Any, ...]
    stride: float
    flops_share: float
    text_tokens: int
    module: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def list_layers(
    denoiser: Denoiser, image_size: int | tuple[int, ...] | None = None, detail: Detail = "blocks"
) -> list[Layer]:
    """Layers of a denoiser in the order in which they are done.

    The network is rebuilt on the meta device from its config: no weights are touched. What was found is kept in the
    process, for the next network of the same class and config.

    Args:
        denoiser: Of any family.
        image_size: Pixels, (H, W), one side, or (frames, H, W) of a video; the configured size if None, of one frame.
        detail: `blocks`: stages, residual blocks, attentions, transformer blocks, the network's own children. `all`:
            every module that returns an image.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> layers = list_layers(Denoiser(unet, DDPMScheduler()))
        >>> [(layer.path, layer.channels, layer.grid) for layer in layers[:2]]
        [('conv_in', 8, (8, 8)), ('down_blocks.0.resnets.0', 8, (8, 8))]
    """
    require_denoiser(denoiser)
    size = denoiser.image_size if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else size
    denoiser.check_size(size)
    small = denoiser.latent_size(size)
    key = architecture_key(denoiser)
    key = key and (key, small, denoiser.stride, detail, registered_outputs())
    with _FINDING:  # another thread may add and drop tables
        kept = None if key is None else _TABLES.get(key)
        if kept is not None:
            _TABLES.move_to_end(key)
            return list(kept)
    table = layer_table(on_meta(denoiser.model), denoiser.family, small, denoiser.stride, denoiser.schedule, detail)
    if key is not None:
        with _FINDING:
            _TABLES[key] = tuple(table)
            while len(_TABLES) > _KEPT:
                _TABLES.popitem(last=False)
    return table


def architecture_key(denoiser: Denoiser) -> tuple[Any, ...] | None:
    """What all that is found without weights depends on, sizes apart; None where that is not a class and a config."""
    inner: Any = plain_module(denoiser.model)
    if not hasattr(inner, "from_config") or not is_rebuilt(inner):
        return None
    family, cls = denoiser.family, type(inner)
    more = {name: _settings(value, cls) if name == "config" else value for name, value in vars(family).items()}
    told = (_settings(inner.config, cls), repr(more), repr(_example_level(denoiser.schedule)))
    if any(" at 0x" in text for text in told):  # of an object that has no text but its address, which others get later
        return None
    return cls, type(family), *told


def _settings(config: Mapping[str, Any], cls: type) -> str:
    """A config as text, the same of a new network and of one that was loaded."""
    told = {k: v for k, v in config.items() if not k.startswith("_")}
    if config.get("_class_name", cls.__name__) != cls.__name__:  # the class may read such a config in its own way
        told["_class_name"] = config["_class_name"]
    return json.dumps(told, sort_keys=True, default=repr)


def list_layers_from_config(
    id_or_folder: str | Path,
    image_size: int | tuple[int, ...] | None = None,
    detail: Detail = "blocks",
    revision: str | None = None,
) -> list[Layer]:
    """As `list_layers`, for a pipeline folder or Hub id, from its JSON configs alone: no weights are loaded.

    Args:
        id_or_folder: Local folder with a `model_index.json`, or Hub id.
        image_size: As in `list_layers`.
        detail: As in `list_layers`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: If the folder is no pipeline folder.
        TypeError: If no family adapter fits the network.
        ValueError: If a file is damaged, names a class that is neither of diffusers nor of this package, or describes
            a network too large to be built.
        OSError: If the Hub cannot be reached or has no such file.
    """
    if Path(id_or_folder).is_dir():
        check_pipeline_folder(Path(id_or_folder))

    def config_of(name: str, file: str = "config.json") -> tuple[dict[str, Any], str]:
        at = f"{name}/{file} of {str(id_or_folder)!r}"
        return check_config(load_json_config(id_or_folder, f"{name}/{file}", revision), at), at

    index, at = load_json_config(id_or_folder, INDEX, revision), f"{INDEX} of {str(id_or_folder)!r}"
    named = {name: index[name] for name in (*COMPONENTS, "scheduler", "vae", "vqvae") if is_component(index.get(name))}
    components = check_index({"_": None, **named}, at, pipeline_modules())
    component = next((name for name in COMPONENTS if name in components), None)
    if component is None:
        raise TypeError(f"{str(id_or_folder)!r} has no component named {' or '.join(COMPONENTS)}.")
    model = _empty(component_class(component, *components[component]), *config_of(component))
    scheduler = None
    if "scheduler" in components:
        cls = component_class("scheduler", *components["scheduler"])
        scheduler = _scheduler(cls, *config_of("scheduler", "scheduler_config.json"))
    # An empty network and the autoencoder's config are all that sizes need.
    denoiser = Denoiser(
        model, scheduler, schedule=None if scheduler is not None else NoiseSchedule("flow", "velocity")
    )
    vae = next((name for name in ("vae", "vqvae") if name in components), None)
    if vae is not None:
        denoiser.vae = SimpleNamespace(config=config_of(vae)[0])
    try:
        return list_layers(denoiser, image_size, detail)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The configs of {str(id_or_folder)!r} do not fit together "
            f"({type(error).__name__}: {printable(str(error))})."
        ) from error


def _empty(cls: type[nn.Module], config: Mapping[str, Any], at: str) -> nn.Module:
    try:
        return build_on_meta(cls, config)
    except Exception as error:  # whatever a constructor of diffusers makes of a config of others
        raise ValueError(
            f"{at}: no {cls.__name__} can be built of it ({type(error).__name__}: {printable(str(error))})."
        ) from error


def _scheduler(cls: Any, config: Mapping[str, Any], at: str) -> Any:
    try:
        return cls.from_config(config)
    except Exception as error:
        raise ValueError(
            f"{at}: no {cls.__name__} can be built of it ({type(error).__name__}: {printable(str(error))})."
        ) from error


def layer_table(
    model: nn.Module,
    family: Family,
    size: tuple[int, ...],
    stride: int,
    schedule: NoiseSchedule | None = None,
    detail: Detail = "blocks",
) -> list[Layer]:
    """As `list_layers`, for a network that is on the meta device; `size` is x_0's, `stride` the VAE's."""
    batch = 2
    x_t = torch.empty(batch, family.channels(), *size, device="meta")
    level = _example_level(schedule)
    inputs = family.inputs(x_t, level, family.example(batch, "meta"))
    inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    wanted = dict(_blocks(model)) if detail == "blocks" else {n: m for n, m in model.named_modules() if n}
    done: dict[str, tuple[Tensor, int]] = {}
    repeated: set[str] = set()
    with ExitStack() as stack, eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as flops:
        hooks = Hooks(stack)
        for path, module in wanted.items():
            if family.is_image(path):
                hooks.after(module, _recorder(path, done, repeated, flops))
        model(**inputs)
        total = max(flops.get_total_flops(), 1)
    layers = []
    for path, (out, spent) in done.items():
        place = None if path in repeated else _place(out, family, size)
        if place is not None:
            kind, channels, grid, text = place
            layers.append(
                Layer(
                    path,
                    kind,
                    channels,
                    grid,
                    stride * size[-2] / grid[-2],
                    spent / total,
                    text,
                    type(wanted[path]).__name__,
                )
            )
    return layers


def _recorder(
    path: str, done: dict[str, tuple[Tensor, int]], repeated: set[str], flops: FlopCounterMode
) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            out = block_output(module, output, path)
        except TypeError:  # not an image for sure, or a class nobody registered: not readable
            return
        if path in done:
            repeated.add(path)
        elif isinstance(out, Tensor):
            done[path] = (out, flops.get_total_flops())

    return record


def _place(
    out: Tensor, family: Family, size: tuple[int, ...]
) -> tuple[Literal["map", "tokens"], int, tuple[Any, ...], int] | None:
    if out.shape[0] != 2 or not out.is_floating_point():
        return None
    if out.ndim == 2 + len(size):
        return "map", out.shape[1], tuple(out.shape[2:]), 0
    if out.ndim == 3:
        found = family.grid(out.shape[1], size)
        if found is not None:
            return "tokens", out.shape[2], found[0], found[1]
    return None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's children, and from there down the elements of module lists."""
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList):
            yield name, child
        yield from _elements(name, child)


def _elements(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if hasattr(module, "to_q"):  # an attention: its lists are projections
        return
    lists = [("", module)] if isinstance(module, nn.ModuleList) else module.named_children()
    for name, child in lists:
        if isinstance(child, nn.ModuleList):
            for at, element in enumerate(child):
                where = ".".join(part for part in (path, name, str(at)) if part)
                yield from _elements(where, element)
                yield where, element


def _example_level(schedule: NoiseSchedule | None) -> NoiseLevel:
    if schedule is None:
        return NoiseLevel(timestep=1.0, nsr=1.0, half_log_snr=0.0, alpha=1.0, sigma=1.0)
    low, high = schedule.timestep_range
    return schedule.resolve((low + high) / 2)


def on_meta(model: nn.Module) -> nn.Module:
    """The same network without weights: from its config, or a copy; itself if it is on the meta device already."""
    inner: Any = plain_module(model)
    if not is_rebuilt(inner):
        return inner
    return build_on_meta(type(inner), inner.config) if hasattr(inner, "from_config") else copy_to_meta(inner)


def is_rebuilt(model: nn.Module) -> bool:
    """Whether `on_meta` makes another network of it: not of one that has no weights anyway."""
    # By accelerate's private mark: weights that it keeps away from the model are on the meta device too. Without it
    # such a network would count as one without weights, and its hooks would run.
    return hasattr(model, "_hf_hook") or not all(p.is_meta for p in model.parameters())


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy without weights and hooks, of any module."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta", requires_grad=False) for _, t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    with hooks_stay():
        twin = copy.deepcopy(model, memo)
    clear_hooks(twin)
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # of hooks of another kind, bound to the original
    return twin
