"""The parts that an index is grown from, how they are written, and what they may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.assign.exact_search import inverse_lengths
from diffusers_repr.assign.inverted_lists import LISTS, InvertedLists
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.store.vector_store import VectorStore, part_name, vectors_hash, write_vectors

_ROWS = 1 << 14


@dataclasses.dataclass
class Part:
    """One growth of an index.

    Attributes:
        blocks: Its vectors, `(n, D)` each, in memory or mapped.
        name: Tells its content.
        lists: Its inverted lists, of an index of kind `ivf`.
    """

    blocks: Sequence[Tensor]
    name: str
    lists: InvertedLists | None = None

    @classmethod
    def of(cls, vectors: Tensor) -> Part:
        """Vectors in memory."""
        inverse_lengths([vectors])  # refuses zeros and NaN
        return cls([vectors], vectors_hash([vectors]))

    @classmethod
    def open(cls, folder: Path, number: int, listed: bool = False) -> Part:
        """A part from the folder of an index.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is not finished or damaged, or its lists are of other vectors.
        """
        store, path = VectorStore.open(folder / part_name(number)), folder / part_name(number) / LISTS
        lists = InvertedLists.open(path) if listed else None
        if lists is not None and len(lists) != len(store):
            raise ValueError(f"{str(path)!r} has {len(lists)} of {len(store)} vectors. Build the index anew.")
        return cls(store.blocks(), store.content, lists)

    @property
    def rows(self) -> int:
        """How many vectors."""
        return sum(map(len, self.blocks))

    def write(self, folder: Path, number: int, shard_size: int | None = None, progress: bool = False) -> None:
        """Write vectors and lists into the folder of an index."""
        whole = self.blocks[0] if len(self.blocks) == 1 else torch.cat(list(self.blocks))
        write_vectors(
            folder / part_name(number),
            self.rows,
            whole.shape[1],
            lambda start, stop: whole[start:stop],
            {"content": self.name},
            dtype=str(whole.dtype).removeprefix("torch."),
            batch_size=_ROWS,
            shard_size=shard_size,
            progress=progress,
        )
        self.write_lists(folder, number)

    def write_lists(self, folder: Path, number: int) -> None:
        """Write the lists, if it has some."""
        if self.lists is not None:
            self.lists.save(folder / part_name(number) / LISTS)


def checked_vectors(embeddings: Any, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """Vectors `(N, D)` for an index.

    Args:
        embeddings: A tensor or array.
        dtype: That they are kept in.
        dim: D, where it is known.

    Raises:
        ValueError: For another shape, or what are no floats.
    """
    vectors = torch.as_tensor(embeddings).detach().cpu()
    if vectors.ndim != 2 or not vectors.numel() or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"embeddings are (N, {dim or 'D'}), N of 1 or more; got {tuple(vectors.shape)}.")
    if not vectors.is_floating_point():
        raise ValueError(f"embeddings are floats; got {vectors.dtype}.")
    return vectors.to(dtype)


def check_kind(kind: str, cells: int | None, probes: int | None, rows: int) -> None:
    """Raise ValueError for a kind that is none, and numbers of lists that cannot be."""
    if kind not in ("exact", "ivf"):
        raise ValueError(f"kind is 'exact' or 'ivf'; got {kind!r}.")
    if kind == "exact" and not (cells is probes is None):
        raise ValueError("cells and probes are of kind 'ivf'; an exact index has none.")
    if cells is not None and check_whole("cells", cells) > rows:
        raise ValueError(f"cells={cells} lists of {rows} vectors; take at most as many, a few thousand at most.")
    if probes is not None:
        check_whole("probes", probes, 1, cells)


__all__ = ["Part", "check_kind", "checked_vectors"]
