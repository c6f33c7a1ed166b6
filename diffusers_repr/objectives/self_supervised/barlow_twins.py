"""`BarlowTwinsObjective`: the numbers of two views are to be equal, each with itself and with no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffusers_repr.models.gathered import gathered
from diffusers_repr.objectives.self_supervised.base import SelfSupervisedObjective, card_of, mlp


def barlow_twins_loss(one: Tensor, two: Tensor, redundancy_weight: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """`sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2`, C the correlations of two views over the batch (eq. 1 and 2).

    Args:
        one: `(B, D)`, B at least 2; with several processes the rows of all of them are one batch.
        two: `(B, D)`; row b of both is a view of the same image.
        redundancy_weight: w, lambda in the paper.
        eps: Added to variances.
    """
    views = torch.stack([one, two], dim=1).to(torch.promote_types(one.dtype, torch.float32))
    if dist.is_initialized() and dist.get_world_size() > 1:
        views = gathered(views)
    with torch.autocast(views.device.type, enabled=False):
        variance, mean = torch.var_mean(views, 0, correction=0)
        first, second = ((views - mean) / (variance + eps).sqrt()).unbind(1)
        correlations = first.T @ second / len(views)
        own = correlations.diagonal()
        return (1 - own).square().sum() + redundancy_weight * (correlations.square().sum() - own.square().sum())


class BarlowTwinsObjective(SelfSupervisedObjective):
    """Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): no negatives, no target; correlations near the identity.

    Args:
        model: As `SelfSupervisedObjective`, and so are mean and std.
        mean: See there.
        std: See there.
        projection_dim: Width of the vectors that are compared; the paper gains by wide ones.
        redundancy_weight: Of the correlations of different numbers.
    """

    card = card_of("barlow-twins")
    discarded = ("projector",)

    def __init__(
        self,
        model: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        projection_dim: int = 128,
        redundancy_weight: float = 5e-3,
    ) -> None:
        super().__init__(model, mean, std)
        self.redundancy_weight = redundancy_weight
        hidden = 2 * self.width
        self.projector = mlp(self.width, hidden, hidden, projection_dim)

    def compare(self, pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `barlow_twins_loss`; the part of one number, so that the size does not depend on their count."""
        return barlow_twins_loss(*pair, self.redundancy_weight) / pair[0].shape[1]


__all__ = ["BarlowTwinsObjective", "barlow_twins_loss"]
