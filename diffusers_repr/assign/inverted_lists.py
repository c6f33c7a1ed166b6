"""Inverted lists of faiss: vectors by their nearest cell, read by memory map; needs the extra `faiss`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PER_CELL = 64  # vectors that a cell is learned from, at most
_ROWS = 1 << 16
LISTS = "lists.faiss"


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def require_faiss(what: str) -> Any:
    """The module `faiss`.

    Args:
        what: Needs it; begins the message.

    Raises:
        ImportError: Naming the extra.
    """
    if not has_faiss():
        raise ImportError(f'{what} needs faiss: pip install "diffusers-repr[faiss]".')
    import faiss

    return faiss


class InvertedLists:
    """The vectors of one part of an index, of length 1 and in half precision, in lists by their nearest cell.

    Args:
        lists: Of faiss: `IndexIVFScalarQuantizer`.
    """

    def __init__(self, lists: Any) -> None:
        self.lists = lists

    @classmethod
    def train(cls, sample: Tensor, cells: int, seed: int = 0) -> InvertedLists:
        """Empty lists whose cells are the centres of k-means on the sphere, by faiss.

        Args:
            sample: `(n, D)`; 64 vectors a cell are enough.
            cells: How many.
            seed: Of the first centres.
        """
        faiss = require_faiss('An index of kind "ivf"')
        lists = _empty(faiss, faiss.IndexFlatIP(sample.shape[1]), cells)
        lists.cp.seed, lists.cp.min_points_per_centroid, lists.cp.spherical = seed, 1, True
        lists.train(_unit(sample))
        return cls(lists)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> InvertedLists:
        """Lists that are read as they are searched.

        Raises:
            FileNotFoundError: If the file is not there.
            ValueError: If it cannot be read.
            ImportError: Without faiss.
        """
        faiss = require_faiss('An index of kind "ivf"')
        if not Path(path).is_file():
            raise FileNotFoundError(f"{str(path)!r} is missing. Build the index anew.")
        try:
            lists = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} cannot be read by faiss. Build the index anew.") from error
        if not isinstance(lists, faiss.IndexIVFScalarQuantizer):
            raise ValueError(f"{str(path)!r} holds a {type(lists).__name__} and no inverted lists; build it anew.")
        return cls(lists)

    def filled(self, blocks: Sequence[Tensor]) -> InvertedLists:
        """Lists of the vectors of some blocks `(n, D)`, in the same cells."""
        faiss = require_faiss('An index of kind "ivf"')
        empty = _empty(faiss, faiss.clone_index(self.lists.quantizer), self.cells)
        empty.is_trained = True  # half precision has nothing to learn but the cells
        for block in blocks:
            for part in block.split(_ROWS):
                empty.add(_unit(part))
        return InvertedLists(empty)

    @property
    def cells(self) -> int:
        """How many there are."""
        return int(self.lists.nlist)

    def __len__(self) -> int:
        return int(self.lists.ntotal)

    def search(self, queries: Tensor, count: int, probes: int) -> tuple[Tensor, Tensor]:
        """Rows, -1 for none, and scores `(B, count)` of the nearest vectors in the nearest cells.

        Args:
            queries: `(B, D)` of length 1.
            count: How many.
            probes: Cells that are looked into.
        """
        faiss = require_faiss('An index of kind "ivf"')
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        scores, rows = self.lists.search(queries.contiguous().numpy(), count, params=parameters)
        return torch.from_numpy(rows), torch.from_numpy(scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, which is whole or not there."""
        faiss = require_faiss('An index of kind "ivf"')
        path = Path(path)
        hidden = path.with_name(f".{path.name}.tmp")
        faiss.write_index(self.lists, os.fspath(hidden))
        os.replace(hidden, path)


def _empty(faiss: Any, cells: Any, count: int) -> Any:
    """Lists without vectors, which own their table of cells, whatever names Python has for it."""
    form, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    lists = faiss.IndexIVFScalarQuantizer(cells, cells.d, count, form, metric, False)
    lists.own_fields = True
    cells.this.disown()
    return lists


def _unit(vectors: Tensor) -> Any:
    return torch.nn.functional.normalize(vectors.float(), dim=1).contiguous().numpy()


__all__ = ["LISTS", "PER_CELL", "InvertedLists", "has_faiss", "require_faiss"]
