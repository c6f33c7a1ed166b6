"""`RetrievalIndex`: the nearest of many stored vectors by cosine, exactly or by inverted lists, grown part by part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from diffusers_repr.assign.exact_search import inverse_lengths, nearest_candidates, ranked
from diffusers_repr.assign.index_parts import Part, check_kind, checked_vectors
from diffusers_repr.assign.inverted_lists import PER_CELL, InvertedLists
from diffusers_repr.hub.files import atomic_write, write_json
from diffusers_repr.store.manifest import recipe_differences
from diffusers_repr.store.tensors import DTYPES
from diffusers_repr.store.vector_store import INDEX_RECORD, VectorTable, read_index_record

Kind = Literal["exact", "ivf"]
FREQUENCIES = "frequencies.safetensors"
_SLACK, _MOST = 8, 4096  # candidates beyond those asked for: at first, and at most where many are equally near
_ROUNDING = {"exact": 1e-5, "ivf": 1e-3}  # of the scores by which candidates are found: float32, half precision


class RetrievalIndex:
    """Vectors that are searched by cosine; what RDM and kNN-Diffusion condition on (arXiv 2204.11824, 2204.02849).

    Vectors are normalised for the search alone; `embeddings` are as they were given. Kind `exact` compares with all of
    them by torch; `ivf` looks into the nearest lists of faiss, memory-mapped, and needs the extra `faiss`. Whatever
    finds candidates, they are ranked by cosines in float64, of equal ones the lower row first: an index of several
    parts gives what the same vectors in one part give.

    Made by `build`, `open` or `from_vectors`.

    Attributes:
        embeddings: The vectors by row number: `index.embeddings[rows]`, float32, `(*rows.shape, D)`.
        kind: `exact` or `ivf`.
        probes: Lists that a search looks into, of kind `ivf`; may be set.
        encoder: Record of what made the vectors; empty where nobody told.
        folder: Where it lies; None in memory.
        parts: What it was grown from.

    Example:
        >>> index = RetrievalIndex.build(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
        >>> rows, scores = index.search(torch.tensor([[0.0, 5.0]]), k=2)
        >>> rows
        tensor([[1, 2]])
    """

    def __init__(
        self,
        parts: Sequence[Part],
        kind: Kind = "exact",
        probes: int | None = None,
        encoder: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.parts, self.kind, self.probes = list(parts), kind, probes
        self.encoder, self.folder = dict(encoder or {}), folder
        self._frequencies: Tensor | None = None
        self._renew()

    def _renew(self) -> None:
        """After a growth."""
        blocks = [block for part in self.parts for block in part.blocks]
        self.embeddings = VectorTable(blocks, self.folder)
        self._inverse: list[Tensor] = []

    @classmethod
    def build(
        cls,
        embeddings: Any,
        folder: str | os.PathLike[str] | None = None,
        kind: Kind = "exact",
        *,
        cells: int | None = None,
        probes: int | None = None,
        encoder: Mapping[str, Any] | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        shard_size: int | None = None,
        progress: bool = False,
    ) -> RetrievalIndex:
        """An index of vectors; `add` grows it.

        Args:
            embeddings: `(N, D)`, a tensor or array, as they are to be read again.
            folder: Where it is written, and memory-mapped from; None keeps it in memory.
            kind: `exact`, or `ivf` (faiss), which is faster and misses some.
            cells: Lists of kind `ivf`; the root of N if None.
            probes: Of these, looked into; a sixteenth if None.
            encoder: Record of what made the vectors, such as `encoder.fingerprint()`.
            dtype: Of the stored vectors.
            shard_size: Vectors of a file; at most 256 MiB if None.
            progress: Show a bar.

        Raises:
            ValueError: For another shape, NaN, zeros, more cells than vectors.
            FileExistsError: If the folder holds an index or anything else.
            ImportError: For kind `ivf` without faiss.
        """
        vectors = checked_vectors(embeddings, DTYPES[dtype])
        check_kind(kind, cells, probes, len(vectors))
        _refuse_index(folder)
        index = cls([Part.of(vectors)], encoder=encoder)._listed(kind, cells, probes)
        return index if folder is None else index.save(folder, shard_size, progress)

    @classmethod
    def from_vectors(
        cls,
        folder: str | os.PathLike[str],
        kind: Kind = "exact",
        *,
        cells: int | None = None,
        probes: int | None = None,
        encoder: Mapping[str, Any] | None = None,
    ) -> RetrievalIndex:
        """An index of vectors that `write_vectors` wrote to `part-00000` of its folder; see `build`."""
        place = Path(folder)
        part = Part.open(place, 0)
        check_kind(kind, cells, probes, part.rows)
        index = cls([part], encoder=encoder, folder=place)._listed(kind, cells, probes)
        index.parts[0].write_lists(place, 0)
        index._write_record()
        return cls.open(place)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], kind: Kind | None = None) -> RetrievalIndex:
        """An index from its folder, mapped into memory: nothing is read before it is searched.

        Args:
            folder: Where it lies.
            kind: `exact` searches the vectors of an index of kind `ivf` without its lists and without faiss; its own
                if None.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: For a damaged one, and `ivf` where there are no lists.
            ImportError: For kind `ivf` without faiss.
        """
        place, found = Path(folder), read_index_record(folder)
        if kind not in (None, "exact", found["kind"]):
            raise ValueError(
                f"{str(folder)!r} is an index of kind {found['kind']!r}; it has no lists of kind {kind!r}."
            )
        kind = kind or found["kind"]
        parts = [Part.open(place, number, kind == "ivf") for number in range(len(found["rows"]))]
        if [part.rows for part in parts] != found["rows"] or {p.blocks[0].shape[1] for p in parts} != {found["dim"]}:
            raise ValueError(
                f"{str(place / INDEX_RECORD)!r} tells parts of {found['rows']} vectors of {found['dim']} values, and "
                f"there are {[part.rows for part in parts]} of {parts[0].blocks[0].shape[1]}. Build the index anew."
            )
        index = cls(parts, kind, found["probes"], found["encoder"], place)
        counts = place / FREQUENCIES
        if counts.is_file():
            try:
                index._frequencies = index._checked_counts(load_file(counts)["frequencies"])
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"{str(counts)!r} is damaged ({error}); delete it.") from error
        return index

    def save(
        self, folder: str | os.PathLike[str], shard_size: int | None = None, progress: bool = False
    ) -> RetrievalIndex:
        """Write the index to a folder, and give it as it is opened from there.

        Args:
            folder: New or empty.
            shard_size: As in `build`.
            progress: Likewise.

        Raises:
            FileExistsError: If the folder holds an index or anything else.
        """
        _refuse_index(folder)
        copy = RetrievalIndex(self.parts, self.kind, self.probes, self.encoder, Path(folder))
        copy._frequencies = self._frequencies
        for number, part in enumerate(self.parts):
            part.write(Path(folder), number, shard_size, progress)
        copy._write_frequencies()
        copy._write_record()
        return RetrievalIndex.open(folder)

    def add(self, embeddings: Any, shard_size: int | None = None) -> RetrievalIndex:
        """Grow by a part of further vectors `(n, D)`, whose rows follow those that are there.

        Lists of kind `ivf` keep their cells. A folder shows the part once it is whole.

        Args:
            embeddings: As in `build`.
            shard_size: Likewise.

        Raises:
            ValueError: As `build`, and for another number of values.
        """
        part, first = Part.of(checked_vectors(embeddings, self.parts[0].blocks[0].dtype, self.dim)), self.parts[0]
        if first.lists is not None:
            part.lists = first.lists.filled(part.blocks)
        if self.folder is not None:
            part.write(self.folder, len(self.parts), shard_size)
            part = Part.open(self.folder, len(self.parts), self.kind == "ivf")
        self.parts.append(part)
        self._renew()
        if self.folder is not None:
            self._write_record()
        if self._frequencies is not None:
            self._frequencies = torch.cat([self._frequencies, torch.zeros(part.rows, dtype=torch.long)])
            self._write_frequencies()
        return self

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return self.embeddings.dim

    @property
    def cells(self) -> int | None:
        """Lists of kind `ivf`."""
        return None if self.parts[0].lists is None else self.parts[0].lists.cells

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest vectors of each query by cosine, the nearest first.

        Args:
            queries: `(B, D)`, of any length but 0.
            k: How many.
            exclude: `(B,)`, a row that is not to be found for each query, such as the query's own.

        Returns:
            Rows int64 and cosines float32, `(B, k)` each.

        Raises:
            ValueError: For queries of another shape, zeros or NaN, and k beyond the vectors there are.
        """
        queries = self._checked_queries(queries)
        room = len(self) - (exclude is not None)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= room:
            own = " without the excluded one" if exclude is not None else ""
            raise ValueError(f"k={k} neighbours of an index of {len(self)} vectors; k runs from 1 to {room}{own}.")
        if exclude is not None:
            exclude = torch.as_tensor(exclude).reshape(-1).long().cpu()
            if len(exclude) != len(queries):
                raise ValueError(f"exclude has {len(exclude)} rows for {len(queries)} queries; give one each.")
        unit = functional.normalize(queries, dim=1)
        wanted = k + (exclude is not None)
        rows, scores = torch.empty(len(queries), k, dtype=torch.long), torch.empty(len(queries), k)
        todo, count, probes = torch.arange(len(queries)), min(wanted + _SLACK, len(self)), self.probes or 0
        while len(todo):
            found, rough = self._candidates(unit[todo], count, probes)
            order, cosines = ranked(queries[todo], self.embeddings, found, None if exclude is None else exclude[todo])
            rows[todo], scores[todo] = order[:, :k], cosines[:, :k]
            whole = self.kind == "exact" or probes >= (self.cells or 0)
            short = cosines[:, k - 1].isneginf() & (not whole)  # fewer in these lists than were asked for
            least = rough.masked_fill(found < 0, -torch.inf).amin(1)
            close = cosines[:, k - 1] <= least + _ROUNDING[self.kind]  # one that was not found may be as near
            again = short | (close & (count < min(_MOST, len(self))))
            todo = todo[again]
            if bool(short.any()):
                probes = min(2 * probes, self.cells or 0)
            else:
                count = min(4 * count, max(_MOST, wanted), len(self))
        return rows, scores

    def _candidates(self, unit: Tensor, count: int, probes: int) -> tuple[Tensor, Tensor]:
        if self.kind == "exact":
            if not self._inverse:
                self._inverse = inverse_lengths(self.embeddings.blocks)
            return nearest_candidates(unit, self.embeddings.blocks, self._inverse, count)
        rows, scores, start = [], [], 0
        for part in self.parts:
            assert part.lists is not None
            found, score = part.lists.search(unit, min(count, part.rows), probes)
            rows.append(torch.where(found < 0, found, found + start))
            scores.append(score)
            start += part.rows
        best, at = torch.cat(scores, 1).topk(min(count, sum(part.shape[1] for part in rows)), dim=1)
        return torch.cat(rows, 1).gather(1, at), best

    # What training tells

    @property
    def frequencies(self) -> Tensor | None:
        """How often each vector was retrieved by the training images, int64 `(N,)`; None where nobody counted."""
        return self._frequencies

    def count_retrieved(self, neighbours: Any) -> None:
        """Count how often each row occurs among neighbours of the training images, and keep it with the index.

        Args:
            neighbours: Row numbers of any shape, such as a store's `neighbours`.

        Raises:
            ValueError: For rows that the index does not have.
        """
        rows = torch.as_tensor(neighbours).reshape(-1).long()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(
                f"neighbours go from {int(rows.min())} to {int(rows.max())}; the index has {len(self)} rows."
            )
        self._frequencies = torch.bincount(rows, minlength=len(self))
        self._write_frequencies()

    # What it is

    def fingerprint(self) -> dict[str, Any]:
        """What decides what a row number stands for, as JSON: equal for equal vectors in equal parts."""
        parts = self.parts
        return {"dim": self.dim, "rows": [part.rows for part in parts], "parts": [part.name for part in parts]}

    def check_encoder(self, encoder: Mapping[str, Any]) -> None:
        """Refuse queries of another encoder than the index is of.

        Args:
            encoder: Its `fingerprint()`, or that part of it which decides features.

        Raises:
            ValueError: Telling what differs (index -> queries).
        """
        both = {name: value for name, value in self.encoder.items() if name in encoder or name == "weights"}
        differs = recipe_differences(both, {name: encoder.get(name) for name in both})
        if differs:
            raise ValueError(
                f"The index is of another encoder (index -> queries): {'; '.join(differs)}. Encode the queries by the "
                "encoder of the index, or build an index with this one."
            )

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else repr(str(self.folder))
        parts = f"{len(self.parts)} part{'s' * (len(self.parts) > 1)}"
        return f"RetrievalIndex({len(self)} vectors of {self.dim}, {self.kind}, {parts}, {where})"

    # Making

    def _listed(self, kind: Kind, cells: int | None, probes: int | None) -> RetrievalIndex:
        """Make the lists of the one part, of kind `ivf`."""
        if kind == "ivf":
            cells = cells or max(1, round(len(self) ** 0.5))
            sample = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[: PER_CELL * cells]
            trained = InvertedLists.train(self.embeddings[sample.sort().values], cells)
            self.parts[0].lists = trained.filled(self.parts[0].blocks)
            self.kind, self.probes = kind, probes or max(1, cells // 16)
        return self

    def _write_frequencies(self) -> None:
        if self.folder is not None and self._frequencies is not None:
            atomic_write(self.folder / FREQUENCIES, save({"frequencies": self._frequencies}))

    def _write_record(self) -> None:
        assert self.folder is not None
        found: dict[str, Any] = {"kind": self.kind, "dim": self.dim, "rows": [part.rows for part in self.parts]}
        found |= {"cells": self.cells, "probes": self.probes, "encoder": self.encoder}
        write_json(self.folder / INDEX_RECORD, {"format": 1, **found})

    # Checks

    def _checked_queries(self, queries: Tensor) -> Tensor:
        queries = torch.as_tensor(queries).detach().cpu()
        if queries.ndim != 2 or queries.shape[1] != self.dim or not len(queries):
            raise ValueError(f"The index takes queries (B, {self.dim}); got {tuple(queries.shape)}.")
        queries = queries.float()
        if not bool(queries.isfinite().all()):
            raise ValueError("The queries have NaN or infinite values.")
        if not bool((queries != 0).any(1).all()):
            raise ValueError("A query is all zeros, and has no cosine to anything.")
        return queries

    def _checked_counts(self, counts: Tensor) -> Tensor:
        if counts.dtype != torch.int64 or counts.shape != (len(self),) or bool((counts < 0).any()):
            raise ValueError(f"frequencies are {len(self)} counts; got {counts.dtype} {tuple(counts.shape)}")
        return counts


def _refuse_index(folder: str | os.PathLike[str] | None) -> None:
    if folder is not None and (Path(folder) / INDEX_RECORD).exists():
        raise FileExistsError(f"{str(folder)!r} holds an index already; open it and add to it, or name another.")


__all__ = ["Kind", "RetrievalIndex"]
