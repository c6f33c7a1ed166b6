"""`FrequencyPrior`: neighbours of stored images as the condition, where no query is given."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.assign.neighbour_tokens import Neighbours, neighbour_tokens
from diffusers_repr.denoiser.prior import Generators, Prior, StoredPrior
from diffusers_repr.hub.checks import check_whole


class FrequencyPrior(Prior):
    """Draws a stored vector that training often retrieved, and gives its neighbours (arXiv 2204.11824, section 3.3).

    A pseudo-query is drawn from the `share` of the index that is most frequent among the training images' neighbours;
    of equally frequent ones the lower row is in it. Its k nearest stored vectors are the condition, as at training.

    Args:
        index: Whose `frequencies` were counted (`index.count_retrieved`), unless `share` is 1.
        k: Tokens of a condition.
        include_query: The first token is the pseudo-query itself, the others are its k - 1 neighbours (kNN-Diffusion).
        share: Of the index; the paper's 0.01.
        weighted: Draw by frequency; all alike if False.
        exclude_self: Whether the pseudo-query is left out of its own neighbours.

    Example:
        >>> index = RetrievalIndex.build(torch.eye(4))
        >>> index.count_retrieved([2, 2, 3])
        >>> FrequencyPrior(index, k=1, share=0.25).draw(1)
        tensor([[[0., 0., 1., 0.]]])
    """

    def __init__(
        self,
        index: RetrievalIndex,
        k: int = 4,
        *,
        include_query: bool = False,
        share: float = 0.01,
        weighted: bool = False,
        exclude_self: bool = False,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is a part of the index, above 0 and up to 1; got {share}.")
        self.index, self.k, self.include_query = index, check_whole("k", k), include_query
        self.exclude_self = exclude_self or include_query
        found = k - include_query
        if found > len(index) - self.exclude_self:
            raise ValueError(f"k={k} tokens of an index of {len(index)} vectors; take fewer.")
        counts = index.frequencies
        if counts is None:
            if share < 1 or weighted:
                raise ValueError(
                    "The index does not know how often its vectors were retrieved; count them by "
                    "index.count_retrieved(neighbours), or draw from all alike by share=1."
                )
            counts = torch.ones(len(index), dtype=torch.long)
        order = counts.sort(descending=True, stable=True).indices
        self.rows = order[: max(1, round(share * len(index)))]
        self.weights = counts[self.rows].double() if weighted else torch.ones(len(self.rows), dtype=torch.float64)
        if not bool(self.weights.sum() > 0):
            raise ValueError("None of the index was ever retrieved, so weighted=True has nothing to draw.")

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Tokens `(count, k, D)`; see `Prior`."""
        return self.neighbours(self._drawn(count, generator)).tokens

    def draw_rows(self, count: int, generator: Generators = None) -> Tensor:
        """Rows of pseudo-queries, `(count,)`, drawn as `draw` does before it looks for their neighbours."""
        if isinstance(generator, (list, tuple)):
            return torch.cat([self._drawn(1, one) for one in generator])
        return self._drawn(count, generator)  # type: ignore[arg-type]

    def _drawn(self, count: int, generator: torch.Generator | None) -> Tensor:
        device = "cpu" if generator is None else generator.device
        at = torch.multinomial(self.weights.to(device), count, replacement=True, generator=generator).cpu()
        return self.rows[at]

    def neighbours(self, rows: Tensor) -> Neighbours:
        """The condition of stored vectors by row, `.tokens` `(B, k, D)`, and which rows it is of."""
        found, excluded = self.k - self.include_query, rows if self.exclude_self else None
        return neighbour_tokens(self.index, self.index.embeddings[rows], found, self.include_query, excluded)

    def stored(self, count: int, seed: int = 0) -> StoredPrior:
        """As many draws as data, which are saved beside a model; the prior itself needs its index."""
        return StoredPrior(self.draw(count, torch.Generator().manual_seed(seed)))


__all__ = ["FrequencyPrior"]
