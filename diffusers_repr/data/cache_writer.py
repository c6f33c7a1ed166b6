"""From images to a `TensorCache`: which rows there are; how they are written, `store/write.py` says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.store.manifest import recipe_hash
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.tensor_cache import TensorCache
from diffusers_repr.store.tensors import DTYPES, INDEX, TensorLayout
from diffusers_repr.store.write import Plan, Spans, check_folder, choose_shard_size, write_store

Compute = Callable[[Tensor], dict[str, Tensor]]


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
    folder = Path(out)
    check_folder(folder)
    device = process_state().device if settings.device is None else torch.device(settings.device)
    recipe = {**recipe, "mirrors": 2 if settings.both_mirrors else 1, "dtype": settings.dtype}
    one = _computed(compute, data[0]["pixel_values"][None], settings, device)
    row_bytes = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    size = choose_shard_size(TensorCache, folder, len(data), row_bytes, settings.shard_size)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in one.items()}
    layout = TensorLayout(len(data), size, recipe_hash(recipe), kind, shapes, settings.dtype)

    def rows(spans: Spans) -> Iterator[dict[str, Tensor]]:
        """A batch of images at a time; the workers of the loader live through all shards."""
        step = settings.batch_size
        batches = [list(range(at, min(at + step, stop))) for start, stop in spans for at in range(start, stop, step)]
        for batch in DataLoader(data, batch_sampler=batches, num_workers=settings.num_workers):
            yield {INDEX: batch["index"], **_computed(compute, batch["pixel_values"], settings, device)}

    plan = Plan(
        TensorCache,
        folder,
        layout,
        recipe,
        rows,
        about or {},
        whole=settings.verify,
        progress=settings.progress,
        what=kind,
    )
    write_store(plan)
    return TensorCache.open(folder, kind)


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
