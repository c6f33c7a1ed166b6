"""Nearest vectors by cosine, exactly, with torch alone; and the ranking of candidates that every search ends in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_repr.store.vector_store import VectorTable

_ROWS, _QUERIES = 1 << 15, 256  # of one product: 32 MiB of scores


def inverse_lengths(blocks: Sequence[Tensor]) -> list[Tensor]:
    """`1 / ||v||` of every vector, block by block, float32.

    Raises:
        ValueError: For a vector of zeros, whose cosine is not defined, and values that are not finite.
    """
    found = []
    for block in blocks:
        squares = torch.cat([part.float().square().sum(1) for part in block.split(_ROWS)])
        if not bool(squares.isfinite().all()):
            raise ValueError(f"Embedding {int((~squares.isfinite()).nonzero()[0])} has NaN or infinite values.")
        if not bool((squares > 0).all()):
            raise ValueError(
                f"Embedding {int((squares <= 0).nonzero()[0])} is all zeros, and has no cosine to anything; leave it "
                "out."
            )
        found.append(squares.rsqrt())
    return found


def nearest_candidates(
    queries: Tensor, blocks: Sequence[Tensor], inverse: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The `count` rows of the largest cosine, in no order: rows int64 and float32 scores, `(B, count)` each.

    Args:
        queries: `(B, D)` float32, of length 1.
        blocks: The vectors.
        inverse: Of `inverse_lengths`.
        count: At most as many as there are vectors.
    """
    parts = [_of_some(some, blocks, inverse, count) for some in queries.split(_QUERIES)]
    rows, scores = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(scores)


def _of_some(
    queries: Tensor, blocks: Sequence[Tensor], inverse: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    rows = torch.empty(len(queries), 0, dtype=torch.long)
    scores = torch.empty(len(queries), 0)
    start = 0
    for block, lengths in zip(blocks, inverse, strict=True):
        for part, scale in zip(block.split(_ROWS), lengths.split(_ROWS), strict=True):
            found = queries @ part.float().T * scale
            best, at = found.topk(min(count, len(part)), dim=1, sorted=False)
            scores, rows = torch.cat([scores, best], 1), torch.cat([rows, at + start], 1)
            if scores.shape[1] > count:
                scores, kept = scores.topk(count, dim=1, sorted=False)
                rows = rows.gather(1, kept)
            start += len(part)
    return rows, scores


def ranked(queries: Tensor, table: VectorTable, rows: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """Candidates in order: the largest cosine first, of equal ones the lower row; excluded rows and -1 last.

    Cosines are computed in float64 from the stored vectors themselves and rounded to float32, so that the order
    depends neither on what found the candidates nor on how the vectors lie in shards.

    Args:
        queries: `(B, D)`, as they were given.
        table: The vectors.
        rows: Candidates `(B, c)`; -1 for none.
        exclude: `(B,)` rows that are no candidates; None for none.

    Returns:
        Rows and scores, `(B, c)` each; a score of `-inf` marks those that do not count.
    """
    rows = rows.sort(dim=1).values
    found = torch.stack([_cosines(query, table[some.clamp(min=0)]) for query, some in zip(queries, rows, strict=True)])
    away = rows < 0 if exclude is None else (rows < 0) | (rows == exclude[:, None])
    scores, order = found.masked_fill(away, -torch.inf).sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order), scores


def _cosines(query: Tensor, vectors: Tensor) -> Tensor:
    q, v = query.double(), vectors.double()
    return ((v * q).sum(1) / (v.square().sum(1).sqrt() * q.square().sum().sqrt())).float()


__all__ = ["inverse_lengths", "nearest_candidates", "ranked"]
