"""From a data set to a `TensorCache`: bounded memory, several processes, and a resume by the same call."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.features.extraction import process_state
from diffusers_repr.features.recipe import recipe_differences, recipe_hash
from diffusers_repr.hub import write_json
from diffusers_repr.hub.files import only_writer
from diffusers_repr.store.cache_manifest import read_manifest
from diffusers_repr.store.manifest import MANIFEST
from diffusers_repr.store.tensor_cache import (
    DTYPES,
    CacheLayout,
    TensorCache,
    shard_problem,
    write_shard,
)

Compute = Callable[[Tensor], dict[str, Tensor]]
_COMMAND = "examples/cache_latents.py"
_SHARD_BYTES = 256 * 2**20  # of a shard without shard_size, at most
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """How a cache is written; nothing here but the dtype and the mirrors changes what is in it.

    Attributes:
        both_mirrors: Encode the image and its mirror, each by itself.
        dtype: Of the stored values: `float32` or `float16`.
        batch_size: Images of one forward.
        shard_size: Rows of a shard; what an earlier call chose, else at most 256 MiB, if None.
        num_workers: Processes that decode images.
        device: Where the network works; that of the process if None.
        progress: Show a bar on the main process.
        verify: Read shards that are there already and compare their checksums.

    Raises:
        ValueError: For a value out of range.
    """

    both_mirrors: bool = True
    dtype: str = "float32"
    batch_size: int = 16
    shard_size: int | None = None
    num_workers: int = 0
    device: str | torch.device | None = None
    progress: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; a cache is stored as {' or '.join(DTYPES)}.")
        for name in ("batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class _Plan:
    """One cache, the same on every process."""

    out: Path
    data: TrainData
    compute: Compute
    layout: CacheLayout
    recipe: dict[str, Any]
    about: dict[str, Any]
    settings: CacheSettings
    device: torch.device

    def manifest(self, complete: bool) -> dict[str, Any]:
        """What `manifest.json` holds."""
        packages = ("diffusers-repr", "torch", "diffusers", "transformers", "datasets")
        return {
            "format": 1,
            "complete": complete,
            "layout": self.layout.to_dict(),
            "recipe": self.recipe,
            "about": self.about,
            "versions": {name: version(name) for name in packages},
        }


def write_cache(
    out: str | os.PathLike[str],
    kind: str,
    data: TrainData,
    compute: Compute,
    recipe: dict[str, Any],
    settings: CacheSettings,
    about: dict[str, Any] | None = None,
) -> TensorCache:
    """Write what `compute` makes of every image; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards. A shard holds fixed rows and depends on nothing but the
    recipe, so neither a kill nor the number of processes changes what is in it. Memory holds one shard.

    Args:
        out: Folder of the cache; new, empty, or of an earlier call with the same recipe.
        kind: `latents` or `features`.
        data: Images, with uint8 `pixel_values` and `index`.
        compute: Pixels `(B, C, H, W)` in [-1, 1] on the device to tensors `(B, ...)` by name.
        recipe: All that decides the values but mirrors and dtype, as JSON.
        settings: See `CacheSettings`.
        about: What is told of it, without deciding anything.

    Raises:
        FileExistsError: If the folder holds another recipe (tells what differs), or is no cache.
        ValueError: If values are not finite or overflow the dtype, or an image cannot be read.
        OSError: If the disk is full; what is written stays valid.
    """
    from accelerate.utils import gather_object

    state = process_state()
    plan = _plan(Path(out), kind, data, compute, recipe, settings, about or {}, state.device)
    with only_writer(plan.out, _COMMAND) if state.is_main_process else nullcontext():
        error: Exception | None = None
        if state.is_main_process:
            try:
                _prepare(plan)
            except (OSError, ValueError) as caught:
                error = caught
        told = [text for text in gather_object([str(error) if error else None]) if text]
        if error is not None:
            raise error
        if told:
            raise RuntimeError(f"Process 0 stopped: {told[0]}")
        mine = range(state.process_index, plan.layout.shards, state.num_processes)
        todo = sorted(gather_object([shard for shard in mine if _is_to_do(plan, shard)]))
        todo = todo[state.process_index :: state.num_processes]
        _write_all(plan, todo, settings.progress and state.is_main_process, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            write_json(plan.out / MANIFEST, plan.manifest(True))
        state.wait_for_everyone()
    return TensorCache.open(plan.out, kind)


def _plan(
    out: Path,
    kind: str,
    data: TrainData,
    compute: Compute,
    recipe: dict[str, Any],
    settings: CacheSettings,
    about: dict[str, Any],
    device: torch.device,
) -> _Plan:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; give a folder for the cache.")
    device = device if settings.device is None else torch.device(settings.device)
    recipe = {**recipe, "mirrors": 2 if settings.both_mirrors else 1, "dtype": settings.dtype}
    one = _computed(compute, data[0]["pixel_values"][None], settings, device)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in one.items()}
    size = settings.shard_size or _earlier_shard_size(out)
    if size is None:
        row = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
        size = max(1, min(len(data), _SHARD_BYTES // row))
    layout = CacheLayout(kind, len(data), size, shapes, settings.dtype, recipe_hash(recipe))
    return _Plan(out, data, compute, layout, recipe, about, settings, device)


def _earlier_shard_size(out: Path) -> int | None:
    if not (out / MANIFEST).is_file():
        return None
    return read_manifest(out)["layout"]["shard_size"]


# The folder


def _prepare(plan: _Plan) -> None:
    """Refuse what is another's, clear what a kill left, say what will be here."""
    shards = sorted((plan.out / "data").glob("*.safetensors"))
    if (plan.out / MANIFEST).is_file():
        _check_same(plan, read_manifest(plan.out), bool(shards))
    else:
        strangers = [p.name for p in plan.out.iterdir() if not p.name.startswith(".") and p.name != "data"]
        if strangers:
            raise FileExistsError(
                f"{str(plan.out)!r} is not empty and is no cache (it holds {', '.join(sorted(strangers)[:8])}); "
                "nothing was changed. Give another folder."
            )
    for leftover in (plan.out / "data").glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    todo = any(not (plan.out / plan.layout.path(shard)).is_file() for shard in range(plan.layout.shards))
    if todo or not (plan.out / MANIFEST).is_file():
        write_json(plan.out / MANIFEST, plan.manifest(False))


def _check_same(plan: _Plan, manifest: dict[str, Any], shards: bool) -> None:
    """A recipe binds once a shard of it is there."""
    layout = CacheLayout.from_dict(manifest["layout"])
    old = {**manifest["recipe"], "kind": layout.kind, "shard_size": layout.shard_size}
    new = {**plan.recipe, "kind": plan.layout.kind, "shard_size": plan.layout.shard_size}
    differences = recipe_differences(old, new)
    if shards and differences:
        raise FileExistsError(
            f"{str(plan.out)!r} holds a cache of another recipe; nothing was changed. What differs (there -> now): "
            f"{'; '.join(differences)}. Run the old command to finish it, or give another folder."
        )


def _is_to_do(plan: _Plan, shard: int) -> bool:
    """Whether a shard is to be written; says so of one that is there but not whole."""
    problem = shard_problem(plan.out, plan.layout, shard, plan.settings.verify)
    if problem not in (None, "is missing"):
        _logger.warning("%s %s; it is written anew.", plan.layout.path(shard), problem)
    return problem is not None


# The work


def _write_all(plan: _Plan, todo: Sequence[int], progress: bool, processes: int) -> None:
    from tqdm.auto import tqdm

    spans = [plan.layout.span(shard) for shard in todo]
    what = plan.layout.kind if processes == 1 else f"{plan.layout.kind} (1 of {processes} processes)"
    total = sum(stop - start for start, stop in spans)
    batches = _batches(plan, spans)
    with tqdm(total=total, unit=" images", desc=what, disable=not (progress and todo)) as bar:
        for shard, (start, stop) in zip(todo, spans, strict=True):
            try:
                _write_one(plan, shard, batches, stop - start, bar)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                done = sum((plan.out / plan.layout.path(n)).is_file() for n in range(plan.layout.shards))
                raise OSError(
                    error.errno,
                    f"The disk is full while {plan.layout.path(shard)} is written. {done} of {plan.layout.shards} "
                    f"shards in {str(plan.out)!r} are whole and stay. Free space, then run the same command again",
                ) from error


def _batches(plan: _Plan, spans: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The images of the shards in turn; no batch lies in two of them, and the workers live through all."""
    size = plan.settings.batch_size
    rows = [list(range(at, min(at + size, stop))) for start, stop in spans for at in range(start, stop, size)]
    loader = DataLoader(plan.data, batch_sampler=rows, num_workers=plan.settings.num_workers)
    return iter(loader)


def _write_one(plan: _Plan, shard: int, batches: Iterator[dict[str, Any]], rows: int, bar: Any) -> None:
    dtype = DTYPES[plan.layout.dtype]
    tensors = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in plan.layout.tensors.items()}
    index = torch.empty(rows, dtype=torch.int64)
    at = 0
    while at < rows:
        batch = next(batches)
        stop = at + len(batch["index"])
        index[at:stop] = batch["index"]
        for name, values in _computed(plan.compute, batch["pixel_values"], plan.settings, plan.device).items():
            tensors[name][at:stop] = values
        bar.update(stop - at)
        at = stop
    write_shard(plan.out, plan.layout, shard, tensors, index)


@torch.no_grad()
def _computed(compute: Compute, pixels: Tensor, settings: CacheSettings, device: torch.device) -> dict[str, Tensor]:
    """`(B, mirrors, ...)` of a batch of uint8 images by name, on the CPU in the stored dtype."""
    images = to_unit(pixels.to(device, non_blocking=True))
    mirrors = [compute(images), compute(images.flip(-1))] if settings.both_mirrors else [compute(images)]
    stored = {}
    for name in mirrors[0]:
        values = torch.stack([mirror[name] for mirror in mirrors], dim=1)
        cast = values.to("cpu", DTYPES[settings.dtype])
        if not bool(torch.isfinite(cast).all()):
            reach = float(values.float().abs().max())
            raise ValueError(
                f"{name!r} reach {reach:.4g}, more than {settings.dtype} holds; use dtype float32, or a network that "
                "stays finite."
            )
        stored[name] = cast
    return stored
