"""`VectorStore`: a vector of every row of a data set, read by memory map; `VectorTable`: rows of several as one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.schema import Check, anything, integer, listing, mapping, one_of, optional, record
from diffusers_repr.store.manifest import MANIFEST, MAX_ROWS, SIDE, layout_schema, manifest_schema, recipe_hash
from diffusers_repr.store.store import Store
from diffusers_repr.store.tensors import DTYPES, INDEX, TensorLayout
from diffusers_repr.store.write import Plan, Spans, check_folder, choose_shard_size, write_store

Vectors = Callable[[int, int], Tensor]
INDEX_RECORD = "index.json"
_KIND, _NAME = "vectors", "vector"
_DTYPE = one_of(*DTYPES)
_INDEX = record(
    {
        "format": one_of(1),
        "kind": one_of("exact", "ivf"),
        "dim": SIDE,
        "rows": listing(integer(1, MAX_ROWS), 1, 100_000),
        "cells": optional(integer(1, 1 << 31)),
        "probes": optional(integer(1, 1 << 31)),
        "encoder": mapping(anything()),
    }
)


class VectorStore(Store):
    """A float vector a row, in safetensors shards that are mapped into memory; made by `write_vectors`."""

    noun: ClassVar[str] = "store of vectors"
    command: ClassVar[str] = "diffusers-repr assign"
    schema: ClassVar[Check] = staticmethod(
        manifest_schema(
            {
                "layout": layout_schema(
                    one_of(_KIND), tensors=mapping(listing(SIDE, 1, 1), 1, 1, keys=one_of(_NAME)), dtype=_DTYPE
                ),
                "recipe": record({"dtype": _DTYPE}, others=True),
                "about": mapping(anything()),
            }
        )
    )
    layout_type: ClassVar[type[TensorLayout]] = TensorLayout

    layout: TensorLayout

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a finished store.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no store of vectors.
            ValueError: If it is not finished, or its manifest is damaged.
        """
        return cls.open_folder(Path(folder))

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return self.layout.tensors[_NAME][0]

    @property
    def content(self) -> str:
        """Tells what is in it: a hash of the values, or of all that decides them."""
        return str(self.recipe.get("content", self.layout.recipe))

    def blocks(self) -> list[Tensor]:
        """Each shard's vectors `(n, dim)`, mapped into memory: nothing is read before it is used.

        Raises:
            ValueError: If a shard is missing or cut short; names the file and the remedy.
        """
        return [self._block(shard) for shard in range(self.layout.shards)]

    def _block(self, shard: int) -> Tensor:
        self._check_shard(shard)
        try:
            with safe_open(self.folder / self.layout.path(shard), "pt") as file:
                return file.get_tensor(_NAME)
        except (SafetensorError, OSError) as error:
            raise self._broken(shard, f"cannot be read ({error})") from error


class VectorTable:
    """Vectors by row number, from blocks in memory or mapped from disk: `table[rows]`.

    It may be sent to other processes, which map the files for themselves.

    Args:
        blocks: `(n, D)` each, float32 or float16, one after the other.
        folder: Where they can be mapped from again: of a `VectorStore` or of an index.
    """

    def __init__(self, blocks: Sequence[Tensor], folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._set(blocks)

    def _set(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = list(blocks)
        self._starts = torch.tensor([0, *accumulate(len(block) for block in self.blocks)])

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> VectorTable:
        """The vectors of a `VectorStore`, or of all parts of an index.

        Raises:
            FileNotFoundError: If the folder is neither.
            ValueError: If it is not finished, or a file is damaged.
        """
        return cls(_mapped(Path(folder)), folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return self.blocks[0].shape[1]

    def __getitem__(self, rows: Any) -> Tensor:
        """Vectors `(*rows.shape, dim)` of row numbers, float32.

        Raises:
            IndexError: For a row that is not there.
        """
        index = torch.as_tensor(rows)
        flat = index.reshape(-1).long()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"Rows {int(flat.min())} to {int(flat.max())} of {len(self)} vectors.")
        found = torch.empty(len(flat), self.dim)
        block = torch.searchsorted(self._starts, flat, right=True) - 1
        for one in block.unique().tolist():
            here = block == one
            found[here] = self.blocks[one][flat[here] - self._starts[one]].float()
        return found.reshape(*index.shape, self.dim)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "blocks": self.blocks if self.folder is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._set(_mapped(self.folder) if state["blocks"] is None else state["blocks"])


def part_name(part: int) -> str:
    """Folder of a part of an index.

    Example:
        >>> part_name(3)
        'part-00003'
    """
    return f"part-{part:05d}"


def read_index_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`index.json` of an index of vectors, checked.

    Raises:
        FileNotFoundError: If the folder holds none.
        ValueError: For a damaged one.
    """
    path = Path(folder) / INDEX_RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no index: it has no {INDEX_RECORD}. `diffusers-repr assign --method neighbours` "
            "or RetrievalIndex.build(..., folder) makes one."
        )
    return _INDEX(read_json(path), str(path))


def index_fingerprint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What decides what a row number of an index stands for, as JSON; `RetrievalIndex.fingerprint` of its folder.

    Raises:
        FileNotFoundError, ValueError: As `VectorTable.open`.
    """
    found = read_index_record(folder)
    names = [VectorStore.open(Path(folder) / part_name(part)).content for part in range(len(found["rows"]))]
    return {"dim": found["dim"], "rows": found["rows"], "parts": names}


def write_vectors(
    out: str | os.PathLike[str],
    rows: int,
    dim: int,
    vectors: Vectors,
    recipe: Mapping[str, Any],
    *,
    dtype: str = "float32",
    batch_size: int = 1024,
    shard_size: int | None = None,
    progress: bool = True,
) -> VectorStore:
    """Write a vector for every row; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards.

    Args:
        out: Folder of the store; new, empty, or of an earlier call with the same recipe.
        rows: How many.
        dim: Values of a vector.
        vectors: Called with a first row and the row after the last: `(n, dim)`.
        recipe: All that decides the values, as JSON.
        dtype: Of the file: `float32` or `float16`.
        batch_size: Rows of one call of `vectors`.
        shard_size: Rows of a file; what an earlier call chose, else at most 256 MiB, if None.
        progress: Show a bar on the main process.

    Raises:
        FileExistsError: If the folder holds vectors of another recipe (tells what differs), or is none.
        ValueError: For vectors of another shape, NaN, and values beyond the dtype.
        OSError: If the disk is full; what is written stays valid.
    """
    folder = Path(out)
    check_folder(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; vectors are stored as {' or '.join(DTYPES)}.")
    whole = {**recipe, "rows": rows, "dtype": dtype}
    size = choose_shard_size(VectorStore, folder, rows, dim * DTYPES[dtype].itemsize, shard_size)
    layout = TensorLayout(rows, size, recipe_hash(whole), _KIND, {_NAME: (dim,)}, dtype)

    def batches(spans: Spans) -> Iterator[dict[str, Any]]:
        for start, stop in spans:
            for at in range(start, stop, batch_size):
                end = min(at + batch_size, stop)
                found = vectors(at, end).detach().to("cpu", DTYPES[dtype])
                if found.shape != (end - at, dim):
                    raise ValueError(
                        f"Rows {at} to {end - 1} have vectors {tuple(found.shape)}, not {(end - at, dim)}."
                    )
                if not bool(found.isfinite().all()):
                    raise ValueError(
                        f"The vectors of rows {at} to {end - 1} have NaN, infinity, or more than {dtype}."
                    )
                yield {INDEX: torch.arange(at, end), _NAME: found}

    write_store(Plan(VectorStore, folder, layout, whole, batches, whole=False, progress=progress, what="vectors"))
    return VectorStore.open(folder)


def vectors_hash(blocks: Sequence[Tensor]) -> str:
    """A hash of vectors' bytes, in whatever blocks they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        for part in block.split(1 << 16):
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mapped(folder: Path) -> list[Tensor]:
    if (folder / MANIFEST).is_file():
        return VectorStore.open(folder).blocks()
    found = read_index_record(folder)
    stores = [VectorStore.open(folder / part_name(part)) for part in range(len(found["rows"]))]
    for part, (store, rows) in enumerate(zip(stores, found["rows"], strict=True)):
        if (len(store), store.dim) != (rows, found["dim"]):
            raise ValueError(
                f"{str(folder / INDEX_RECORD)!r} tells {rows} vectors of {found['dim']} values in {part_name(part)}, "
                f"which holds {len(store)} of {store.dim}. Build the index anew."
            )
    return [block for store in stores for block in store.blocks()]


__all__ = [
    "VectorStore",
    "VectorTable",
    "index_fingerprint",
    "part_name",
    "read_index_record",
    "vectors_hash",
    "write_vectors",
]
