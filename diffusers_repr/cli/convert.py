"""`diffusers-repr convert CHECKPOINT --out FOLDER`: REPA, REG, SiT, DiT and HybViT checkpoints to a pipeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.models.convert import ConvertedCheckpoint


OUT = options.Out("converted pipeline or head", ("model_index.json", "config.json"), replaced=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("checkpoint",)

    checkpoint: str = setting(REQUIRED, "a .pt file (read without running code in it) or .safetensors")
    out: str = setting(REQUIRED, "folder to write; `SiTPipeline` (of HybViT `JointDiffusionPipeline`) loads it")
    weights: Literal["ema", "model", "state_dict", "model_state_dict"] | None = setting(
        None, "which of those in the file; ema if there, else model"
    )
    architecture: Literal["sit", "dit", "hybvit"] | None = setting(
        None,
        "what the network predicts: a velocity (REPA too), noise, or noise and classes; needed where the file does "
        "not tell",
    )
    model_config: str | None = setting(
        None,
        "arguments of the network that shapes do not tell, JSON or a file with JSON or YAML: "
        "'{\"num_attention_heads\": 6}'",
    )
    path: Literal["linear", "cosine"] | None = setting(None, "of a sit; linear if not given")
    sampler: Literal["sde", "ode"] | None = setting(None, "of a sit, sde if not given; dit gets DDIM")
    vae: str | None = setting(
        None, "folder or Hub id of an AutoencoderKL to put beside, such as stabilityai/sd-vae-ft-ema"
    )
    base: str | None = setting(
        None, "of a readout head: folder or Hub id of the model it was trained on, whose time embedding it takes over"
    )
    kind: Literal["spatial", "appearance", "correspondence"] | None = setting(
        None, "of a readout head, where the file does not tell"
    )
    overwrite: bool = setting(False, "replace the folder if it exists")


def run(args: Settings) -> int:
    """Convert, and print what was written."""
    from diffusers_repr.cli.convert_readout import save_readout
    from diffusers_repr.heads.convert import is_published_readout
    from diffusers_repr.hub.files import atomic_folder
    from diffusers_repr.models import JointViTModel, SiTTransformer2DModel
    from diffusers_repr.models.checkpoint import read_checkpoint, select_weights
    from diffusers_repr.models.convert import convert_state_dict
    from diffusers_repr.models.convert_joint import convert_joint_vit, is_joint_vit

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{args.out!r} exists already; give another folder, or --overwrite.")
    held = read_checkpoint(args.checkpoint)
    if is_published_readout(held):
        others = ("weights", "architecture", "model_config", "path", "sampler", "vae")
        _refuse(args, others, "A readout head is no network by itself")
        save_readout(args, held)
        return 0
    _refuse(args, ("base", "kind"), "This is no checkpoint of a readout head")
    overrides = read_config(args.model_config)
    weights, name = select_weights(held, args.weights)
    joint = args.architecture == "hybvit" or (args.architecture is None and is_joint_vit(weights))
    _refuse(args, ("vae", "path", "sampler") if joint else (), "A HybViT is a network of pixels with a DDPM")
    overrides = checked(overrides, JointViTModel if joint else SiTTransformer2DModel)
    try:
        if joint:
            converted = convert_joint_vit(weights, overrides)
        else:
            converted = convert_state_dict(weights, args.architecture, overrides)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint!r}: {error}") from error
    pipe = _joint_pipeline(converted) if joint else _pipeline(converted, args)
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        pipe.save_pretrained(folder)
        _save_projectors(converted, folder)
    _report(converted, name, out)
    return 0


def _refuse(args: Settings, names: tuple[str, ...], why: str) -> None:
    """Arguments that would do nothing for this network."""
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{why}; drop {', '.join(given)}.")


def read_config(given: str | None) -> dict[str, Any]:
    """Arguments of the network, from JSON text or a file with JSON or YAML.

    Raises:
        FileNotFoundError: If it is neither JSON text nor a file.
        ValueError: For text that is no JSON or YAML object, or values of another kind.
    """
    from diffusers_repr.hub.schema import boolean, either, integer, listing, mapping, number, optional, shown
    from diffusers_repr.hub.schema import text as schema_text
    from diffusers_repr.hub.yaml_text import parse_yaml, read_text

    if given is None:
        return {}
    text, at = given, "--model_config"
    if not given.lstrip().startswith("{"):
        path = Path(given)
        if len(given) > 4096 or not path.is_file():
            raise FileNotFoundError(f"--model_config {shown(given)} is no file, and no JSON object either ({{...}}).")
        text, at = read_text(path), str(path)
    try:
        config = json.loads(text) if text.lstrip().startswith("{") else parse_yaml(text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--model_config {shown(given)} is no JSON or YAML ({error}).") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ValueError(f"--model_config {shown(given)} holds a {kind}; an object of arguments is needed.")
    config = {key: value for key, value in config.items() if not str(key).startswith("_")}
    names = listing(schema_text(1000), 1), mapping(schema_text(1000), 1)
    sizes = listing(integer(1, 1_000_000), 1, 8)
    argument = either(boolean(), integer(-1, 1_000_000), number(-1e6, 1e6), schema_text(200), *names, sizes)
    return mapping(optional(argument))(config, at)


def checked(config: dict[str, Any], model: type) -> dict[str, Any]:
    """The arguments, if a model takes all of them.

    Raises:
        ValueError: For unknown ones.
    """
    import inspect

    known = set(inspect.signature(model.__init__).parameters) - {"self"}  # type: ignore[misc]
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"--model_config has {', '.join(unknown)}; {model.__name__} takes {', '.join(sorted(known))}."
        )
    return config


def _pipeline(converted: ConvertedCheckpoint, args: Settings) -> Any:
    from diffusers import DDIMScheduler

    from diffusers_repr.denoiser.loading import load_autoencoder
    from diffusers_repr.models import ClassTokenHead, SiTTransformer2DModel
    from diffusers_repr.pipelines.sit import SiTPipeline
    from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
    from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

    model = _network(SiTTransformer2DModel, converted)
    scheduler: Any
    if converted.architecture == "dit":
        _refuse(args, ("path", "sampler"), "A DiT gets DDIM")
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    else:
        cls = FlowMatchODEScheduler if args.sampler == "ode" else FlowMatchSDEScheduler
        scheduler = cls(path=args.path or "linear")
    vae = None if args.vae is None else load_autoencoder(args.vae)
    head = None
    if converted.class_token is not None:
        embed = converted.class_token["embed.weight"]
        head = ClassTokenHead(*embed.shape).to(embed.dtype)
        head.load_state_dict(converted.class_token)
    return SiTPipeline(model, scheduler, vae, class_token=head)


def _joint_pipeline(converted: ConvertedCheckpoint) -> Any:
    from diffusers import DDPMScheduler

    from diffusers_repr.models import JointViTModel
    from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline

    return JointDiffusionPipeline(_network(JointViTModel, converted), DDPMScheduler(**converted.scheduler))


def _network(model: Any, converted: ConvertedCheckpoint) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # nothing is drawn, and nothing held twice
        network = model(**converted.config)
    network.load_state_dict(converted.transformer, assign=True)
    return network.eval()


def _save_projectors(converted: ConvertedCheckpoint, folder: Path) -> None:
    from diffusers_repr.heads.projector import Projector

    for at, state in enumerate(converted.projectors):
        (hidden, width), out = state["0.weight"].shape, state["4.weight"].shape[0]
        projector = Projector(width, out, hidden_dim=hidden).to(state["0.weight"].dtype)
        projector.load_state_dict({f"layers.{name}": value for name, value in state.items()})
        projector.save_pretrained(folder / "heads" / f"projector-{at}")


def _report(converted: ConvertedCheckpoint, name: str, out: Path) -> None:
    config = converted.config
    count = sum(value.numel() for value in converted.transformer.values())
    source = f"the weights {name!r}" if name else "the weights"
    print(
        f"Wrote {source} to {out}: {converted.architecture}, {config['num_layers']} blocks of width "
        f"{config['hidden_size']} with {config['num_attention_heads']} heads, patch {config['patch_size']}, "
        f"{config['num_classes']} classes, {count / 1e6:.1f} M parameters, {len(converted.projectors)} projectors."
    )
    for note in converted.notes:
        print(note)
