"""`neighbour_tokens`: the nearest neighbours of queries as sets of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.hub.checks import check_whole


@dataclass(frozen=True)
class Neighbours:
    """What a model is conditioned on, and where it is from.

    Attributes:
        tokens: `(B, k, D)`, or `(B, k + 1, D)` with the query itself as the first.
        rows: Of the neighbours in the index, `(B, k)`, the nearest first.
        scores: Their cosines to the query, `(B, k)`.
    """

    tokens: Tensor
    rows: Tensor
    scores: Tensor


def neighbour_tokens(
    index: RetrievalIndex, queries: Tensor, k: int, include_query: bool = False, exclude: Tensor | None = None
) -> Neighbours:
    """The nearest neighbours of queries as a set of tokens, as they are stored, not normalised.

    `include_query` is kNN-Diffusion (Sheynin et al. 2022, arXiv 2204.02849), without it are those of RDM (Blattmann et
    al. 2022, arXiv 2204.11824), whose `k` with a text counts the query: k - 1 neighbours here.

    Args:
        index: What is searched.
        queries: `(B, D)`.
        k: Neighbours of each; 0 is the query alone.
        include_query: Put the query itself first.
        exclude: Row of each query that is none of its neighbours, `(B,)`.

    Raises:
        ValueError: For queries of another length than the vectors of the index, more neighbours than it has, and no
            tokens at all.
    """
    if check_whole("k", k, 0) == 0 and not include_query:
        raise ValueError("k=0 neighbours without the query are no condition; take k of 1 or more, or the query.")
    rows, scores = torch.empty(len(queries), 0, dtype=torch.long), torch.empty(len(queries), 0)
    if k:
        rows, scores = index.search(queries, k, exclude)
    elif queries.shape[1] != index.dim:
        raise ValueError(f"The index takes queries (B, {index.dim}); got {tuple(queries.shape)}.")
    parts = [queries.cpu().float()[:, None]] if include_query else []
    parts += [index.embeddings[rows].float()] if k else []
    return Neighbours(torch.cat(parts, 1), rows, scores)


__all__ = ["Neighbours", "neighbour_tokens"]
