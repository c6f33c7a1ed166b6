"""`NeighboursAssigner`: the nearest training images, what RDM and kNN-Diffusion are conditioned on."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.assign.base import Assigner, register_assigner
from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.hub.checks import check_whole


@register_assigner("neighbours")
class NeighboursAssigner(Assigner):
    """Rows of the k nearest of the features it was fitted on, by cosine (Blattmann et al. 2022, arXiv 2204.11824).

    It keeps all of them, so it is for sets that fit into memory; larger ones lie in a `RetrievalIndex` on disk. The
    null condition is k times -1, rows of no image; what a model is given of it is its conditioner's.

    Args:
        in_features: D of the features.
        k: Neighbours.
        rows: Features it was fitted on; `fit` sets it.

    Example:
        >>> features = torch.eye(3)
        >>> assigner = NeighboursAssigner(3, k=1).fit(features)
        >>> assigner.assign(torch.tensor([[0.1, 0.9, 0.0]]))
        tensor([[1]])
    """

    gives = "neighbours"

    embeddings: Tensor

    @register_to_config
    def __init__(self, in_features: int, k: int = 4, rows: int = 0) -> None:
        super().__init__()
        self.make_state(in_features)
        self.k = check_whole("k", k)
        self._index: RetrievalIndex | None = None
        self.register_buffer("embeddings", torch.zeros(check_whole("rows", rows, 0), in_features))

    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """See `Assigner`.

        Raises:
            ValueError: For fewer images than neighbours, and features of zeros.
        """
        if len(features) < self.k:
            raise ValueError(f"{self.k} neighbours among {len(features)} images; ask for at most as many.")
        self._index = RetrievalIndex.build(features)
        self.embeddings = features.clone()
        self.register_to_config(rows=len(features))

    @torch.no_grad()
    def assign(self, features: Tensor, exclude: Tensor | None = None) -> Tensor:
        """As `Assigner.assign`; of the images it was fitted on each is its own nearest, unless it is excluded.

        Args:
            features: `(B, in_features)`.
            exclude: `(B,)`, the row of each among those it was fitted on.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: As `prepare`, and where k neighbours are more than there are.
        """
        if exclude is None:
            return super().assign(features)
        self._check_fitted()
        return self.index.search(self.prepare(features), self.k, exclude)[0].to(features.device)

    def assign_prepared(self, features: Tensor) -> Tensor:
        """`(B, k)`, int64, the nearest first."""
        return self.index.search(features, self.k)[0].to(features.device)

    @property
    def index(self) -> RetrievalIndex:
        """What it searches; its `embeddings` are what a model is given."""
        if self._index is None:
            self._index = RetrievalIndex.build(self.embeddings)
        return self._index

    @property
    def null(self) -> Tensor:
        """`(k,)` of -1."""
        return torch.full((self.k,), -1)


__all__ = ["NeighboursAssigner"]
