"""Token sets of nearest neighbours: of a query, and of pseudo-queries that the index itself gives (RDM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.denoiser.prior import HistogramPrior, Prior
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


def neighbour_tokens(index: RetrievalIndex, queries: Tensor, k: int, include_query: bool = False) -> Neighbours:
    """The nearest neighbours of queries as a set of tokens, as they are stored, not normalised.

    `include_query` is kNN-Diffusion (Sheynin et al. 2022, arXiv 2204.02849), without it are those of RDM (Blattmann et
    al. 2022, arXiv 2204.11824), whose `k` with a text counts the query: k - 1 neighbours here.

    Args:
        index: What is searched.
        queries: `(B, D)`.
        k: Neighbours of each; 0 is the query alone.
        include_query: Put the query itself first.

    Raises:
        ValueError: For queries of another length than the vectors of the index, more neighbours than it has, and no
            tokens at all.
    """
    if check_whole("k", k, 0) == 0 and not include_query:
        raise ValueError("k=0 neighbours without the query are no condition; take k of 1 or more, or the query.")
    if k > len(index):
        raise ValueError(f"k={k} neighbours are asked for, and the index has {len(index)} vectors.")
    rows, scores = torch.empty(len(queries), 0, dtype=torch.long), torch.empty(len(queries), 0)
    if k:
        rows, scores = index.search(queries, k)
    elif queries.shape[1] != index.dim:
        raise ValueError(f"The index takes queries (B, {index.dim}); got {tuple(queries.shape)}.")
    parts = [queries.cpu().float()[:, None]] if include_query else []
    parts += [index.embeddings[rows].float()] if k else []
    return Neighbours(torch.cat(parts, 1), rows, scores)


class NeighbourPrior(Prior):
    """Pseudo-queries out of the index, and their neighbours: how RDM samples without a query.

    Args:
        index: What is searched.
        k: Neighbours of each pseudo-query, itself among them.
        include_query: Put the pseudo-query first, as with a query.
        top: Share of the index that pseudo-queries are of, the rows that training images had most often as neighbours;
            None: all rows. RDM's code has 0.01.
        weighted: Draw a row the more often, the more often it was a neighbour; all alike if not.

    Raises:
        ValueError: For a share that is none, and where the index does not know how often its rows were neighbours.
    """

    def __init__(
        self,
        index: RetrievalIndex,
        k: int,
        include_query: bool = False,
        top: float | None = None,
        weighted: bool = False,
    ) -> None:
        self.index, self.k, self.include_query = index, k, include_query
        counts = index.frequencies
        if counts is None and (top is not None or weighted):
            raise ValueError(
                "How often the rows of this index were neighbours of training images is not known: "
                "index.count_retrieved(neighbours), or leave out top and weighted."
            )
        if top is not None and not 0 < top <= 1:
            raise ValueError(f"top is a share of the index, above 0 and up to 1; got {top}.")
        weights = torch.ones(len(index)) if counts is None or not weighted else counts.double()
        if top is not None and counts is not None:
            kept = counts.argsort(descending=True, stable=True)[: max(1, round(top * len(index)))]
            weights = torch.zeros_like(weights).index_copy(0, kept, weights[kept])
        self.rows = HistogramPrior(weights)

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """See `Prior`."""
        return self.neighbours(self.rows.sample(count, generator)).tokens

    def neighbours(self, rows: Tensor) -> Neighbours:
        """Of pseudo-queries, which are rows `(B,)` of the index."""
        return neighbour_tokens(self.index, self.index.embeddings[rows.cpu()], self.k, self.include_query)


__all__ = ["NeighbourPrior", "Neighbours", "neighbour_tokens"]
