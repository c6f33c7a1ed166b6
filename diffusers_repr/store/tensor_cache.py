"""`TensorCache`: a row of tensors for every image of a data set, in safetensors shards read by memory map."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_repr.features.recipe import recipe_differences
from diffusers_repr.hub import atomic_file
from diffusers_repr.hub.schema import inside, integer, record, text
from diffusers_repr.store.cache_manifest import check_manifest, read_manifest
from diffusers_repr.store.manifest import MANIFEST

INDEX = "index"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_STAMP = "diffusers_repr"
_HEADER = {"float32": "F32", "float16": "F16"}  # as safetensors names them
_STAMPED = record({"recipe": text(200), "shard": integer(0), "start": integer(0), "checksum": text(200)})


@dataclass(frozen=True)
class CacheLayout:
    """How rows lie in files.

    Attributes:
        kind: `latents` or `features`.
        rows: Images in all.
        shard_size: Rows of every shard but the last.
        tensors: Shape of one row of each tensor, by name.
        dtype: `float32` or `float16`.
        recipe: Name of the recipe, from `recipe_hash`.
    """

    kind: str
    rows: int
    shard_size: int
    tensors: dict[str, tuple[int, ...]]
    dtype: str
    recipe: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.rows / self.shard_size)

    def path(self, shard: int) -> str:
        """File of a shard, relative to the cache."""
        return f"data/{self.kind}-{shard:05d}-of-{self.shards:05d}.safetensors"

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tensors = {name: list(shape) for name, shape in self.tensors.items()}
        return {**vars(self), "tensors": tensors, "shards": self.shards}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheLayout:
        """The inverse of `to_dict`, of a checked manifest."""
        tensors = {name: tuple(shape) for name, shape in values["tensors"].items()}
        names = ("kind", "rows", "shard_size", "dtype", "recipe")
        return cls(tensors=tensors, **{name: values[name] for name in names})


def write_shard(folder: Path, layout: CacheLayout, shard: int, tensors: Mapping[str, Tensor], index: Tensor) -> None:
    """Write a shard; it takes its name, flushed to disk, when it is whole.

    Args:
        folder: Of the cache.
        layout: Of the cache.
        shard: Its number.
        tensors: `(rows, *shape)` by name, on the CPU in the layout's dtype.
        index: `(rows,)` int64: the row of the data set that each stands for; another than its own where that image
            cannot be read.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an existing shard is untouched then.
    """
    whole = {**tensors, INDEX: index}
    # One key: the order of several in the file would change from run to run
    stamp = json.dumps({**_place(layout, shard), "checksum": checksum(whole)}, sort_keys=True)
    with atomic_file(folder / layout.path(shard)) as file:
        file.write(save(whole, metadata={_STAMP: stamp}))


def shard_problem(folder: Path, layout: CacheLayout, shard: int, verify: bool = False) -> str | None:
    """Why a shard is not what it must be, in a few words; None if it is whole.

    Args:
        folder: Of the cache.
        layout: Of the cache.
        shard: Its number.
        verify: Read it all and compare its checksum; else names, shapes and length of the file alone.
    """
    name, (start, stop) = layout.path(shard), layout.span(shard)
    if not (folder / name).is_file():
        return "is missing"
    try:
        path = inside(folder, name, "a shard")
    except ValueError as error:
        return f"is refused ({error})"
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(_STAMP)
            stamp = {} if told is None else _STAMPED(json.loads(told), "its stamp")
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: tuple(part.get_shape()) for key, part in slices.items()}
            kinds = {key: part.get_dtype() for key, part in slices.items()}
            wanted = {key: (stop - start, *shape) for key, shape in layout.tensors.items()} | {INDEX: (stop - start,)}
            whole = {key: file.get_tensor(key) for key in found} if verify and found == wanted else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return f"cannot be read ({str(error)[:120]})"
    if {key: stamp.get(key) for key in ("recipe", "shard", "start")} != _place(layout, shard):
        return "was not written by this recipe"
    if found != wanted:
        return f"holds {found} instead of {wanted}"
    types = {**dict.fromkeys(layout.tensors, _HEADER[layout.dtype]), INDEX: "I64"}
    if kinds != types:
        return f"holds {kinds} instead of {types}"
    if whole is not None and checksum(whole) != stamp.get("checksum"):
        return "does not fit its checksum"
    return None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(layout: CacheLayout, shard: int) -> dict[str, Any]:
    return {"recipe": layout.recipe, "shard": shard, "start": layout.span(shard)[0]}


class TensorCache:
    """A finished cache, opened for reading; `len(cache)` rows, `cache[i]` a row of each tensor.

    Attributes:
        folder: Where it lies.
        manifest: As written.
        layout: Rows, shards and tensors.
        command: What made it, for messages.

    It may be sent to other processes: each opens the shards it reads for itself.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], command: str = "examples/cache_latents.py") -> None:
        self.folder, self.manifest, self.command = folder, check_manifest(manifest), command
        self.layout = CacheLayout.from_dict(manifest["layout"])
        self._open: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], kind: str) -> TensorCache:
        """Open a finished cache.

        Args:
            folder: Where it lies.
            kind: `latents` or `features`.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no cache.
            ValueError: If it is not finished, of another kind, or its manifest is damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{str(folder)!r} is no cache of {kind}: it has no {MANIFEST} ({inside or 'it is empty'}). "
                "`accelerate launch examples/cache_latents.py ...` makes one."
            )
        cache = cls(folder, read_manifest(folder))
        layout = cache.layout
        if layout.kind != kind:
            raise ValueError(f"{str(folder)!r} holds {layout.kind}, not {kind}.")
        names = {f"data/{file.name}" for file in (folder / "data").glob("*.safetensors")}
        there = [n for n in range(layout.shards) if layout.path(n) in names] if names else []
        if len(there) < layout.shards or not cache.manifest["complete"]:
            images = sum(stop - start for start, stop in map(layout.span, there))
            raise ValueError(
                f"The cache {str(folder)!r} is not finished: {images} of {layout.rows} images ({len(there)} of "
                f"{layout.shards} shards) are there. Run the same `examples/cache_latents.py` command again: it keeps "
                "whole shards and makes the others."
            )
        return cache

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name} {shape}" for name, shape in self.layout.tensors.items())
        return f"TensorCache({str(self.folder)!r}, {len(self)} rows of {tensors}, {self.layout.dtype})"

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Each tensor of a row, and `index`, the row of the data set that it stands for.

        Raises:
            IndexError: For a row that is not there.
            ValueError: If the shard cannot be read, or holds what no cache is written with (NaN, infinity, another
                dtype, a row beyond the data set); names the file and the remedy.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)} in {str(self.folder)!r}.")
        shard, at = divmod(row, self.layout.shard_size)
        slices = self._open.get(shard)
        if slices is None:
            slices = self._open[shard] = self._slices(shard)
        found = {name: part[at] for name, part in slices.items()}
        if not 0 <= int(found[INDEX]) < len(self):
            raise ValueError(self._broken(shard, f"says that row {row} stands for image {int(found[INDEX])}"))
        for name in self.layout.tensors:
            low, high = torch.aminmax(found[name])  # NaN where one value is; a tenth of `isfinite`'s time
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(self._broken(shard, f"holds NaN or infinity in {name!r} of row {row}"))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the values."""
        return self.manifest["recipe"]

    @property
    def mirrors(self) -> int:
        """2: an image and its mirror, 1: the image alone."""
        return self.recipe["mirrors"]

    def verify(self) -> None:
        """Read every shard and check it against its checksum.

        Raises:
            ValueError: For the first shard that is not whole; names the file and the remedy.
        """
        for shard in range(self.layout.shards):
            problem = shard_problem(self.folder, self.layout, shard, verify=True)
            if problem is not None:
                raise ValueError(self._broken(shard, problem))

    def check(self, wanted: Mapping[str, Any], mirrors: int) -> None:
        """Refuse a cache that was made otherwise.

        Args:
            wanted: Parts of the recipe that must be equal, such as `data` and `vae`.
            mirrors: 2 where images are flipped.

        Raises:
            ValueError: Telling what differs (cache -> run).
        """
        stored = {name: self.recipe.get(name) for name in wanted}
        differs = recipe_differences(stored, dict(wanted))
        if differs:
            raise ValueError(
                f"The cache {str(self.folder)!r} was made otherwise than this run needs (cache -> run): "
                f"{'; '.join(differs)}. Run with the settings of the cache, or make another one."
            )
        if mirrors > self.mirrors:
            flag = "--both_mirrors true" if self.layout.kind == "latents" else "--random_flip true"
            raise ValueError(
                f"The cache {str(self.folder)!r} holds no mirrored images, which random_flip needs "
                f"({self.layout.kind} cannot be flipped). Make one with {flag} in another folder, or train without "
                "random_flip."
            )

    def _slices(self, shard: int) -> dict[str, Any]:
        """The tensors of a shard, of which nothing is read yet; a mapped file holds no file descriptor."""
        problem = shard_problem(self.folder, self.layout, shard)
        if problem is not None:
            raise ValueError(self._broken(shard, problem))
        try:
            file = safe_open(self.folder / self.layout.path(shard), "pt")
            return {name: file.get_slice(name) for name in (*self.layout.tensors, INDEX)}
        except (SafetensorError, OSError) as error:
            raise ValueError(self._broken(shard, f"cannot be read ({error})")) from error

    def _broken(self, shard: int, problem: str) -> str:
        return (
            f"Shard {str(self.folder / self.layout.path(shard))!r} {problem}. Delete it and run the same "
            f"`{self.command}` command again: it keeps whole shards and makes the others."
        )
