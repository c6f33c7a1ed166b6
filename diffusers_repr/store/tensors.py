"""Shards as safetensors files, which are read by memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_repr.store.shards import STAMP, Append, Layout, parse_stamp

INDEX = "index"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_HEADER = {"float32": "F32", "float16": "F16"}  # as safetensors names them


@dataclass(frozen=True)
class TensorLayout(Layout):
    """Rows of tensors in safetensors files, with `index`: the row of the data set that each stands for.

    Attributes:
        kind: What is stored.
        tensors: Shape of one row of each tensor, by name.
        dtype: `float32` or `float16`.
    """

    suffix: ClassVar[str] = "safetensors"

    kind: str
    tensors: dict[str, tuple[int, ...]]
    dtype: str

    @property
    def stem(self) -> str:
        """The kind."""
        return self.kind

    @contextmanager
    def writer(self, file: BinaryIO, shard: int) -> Iterator[Append]:
        """See `Layout`; the shard is held in memory until the block ends."""
        start, stop = self.span(shard)
        held = {name: torch.empty(stop - start, *s, dtype=DTYPES[self.dtype]) for name, s in self.tensors.items()}
        held[INDEX] = torch.empty(stop - start, dtype=torch.int64)
        at = 0

        def append(rows: Mapping[str, Any]) -> None:
            nonlocal at
            for name, values in rows.items():
                held[name][at : at + len(values)] = values
            at += len(rows[INDEX])

        yield append
        # One key: the order of several in the file would change from run to run
        stamp = json.dumps({**self.place(shard), "checksum": checksum(held)}, sort_keys=True)
        file.write(save(held, metadata={STAMP: stamp}))

    def stamp(self, path: Path) -> str | None:
        """See `Layout`."""
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(STAMP)

    def header_problem(self, path: Path, shard: int) -> str | None:
        """See `Layout`."""
        start, stop = self.span(shard)
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: tuple(part.get_shape()) for key, part in slices.items()}
            kinds = {key: part.get_dtype() for key, part in slices.items()}
        wanted = {key: (stop - start, *shape) for key, shape in self.tensors.items()} | {INDEX: (stop - start,)}
        if found != wanted:
            return f"holds {found} instead of {wanted}"
        types = {**dict.fromkeys(self.tensors, _HEADER[self.dtype]), INDEX: "I64"}
        return None if kinds == types else f"holds {kinds} instead of {types}"

    def content_problem(self, path: Path, shard: int) -> str | None:
        """See `Layout`: the checksum."""
        with safe_open(path, "pt") as file:
            whole = {key: file.get_tensor(key) for key in (*self.tensors, INDEX)}
        recorded = parse_stamp(self.stamp(path)).get("checksum")
        return None if checksum(whole) == recorded else "does not fit its checksum"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
