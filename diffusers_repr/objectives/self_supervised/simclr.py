"""`SimCLRObjective`: of all other views, which is of the same image?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.models.gathered import gathered
from diffusers_repr.objectives.self_supervised.base import SelfSupervisedObjective, card_of


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (eq. 1): of all other views, those of all processes included, which is of the same image?

    Args:
        one: `(B, D)`.
        two: `(B, D)`; row b of both is a view of the same image.
        temperature: Of the softmax over similarities.
    """
    own = F.normalize(torch.cat([one, two]).float(), dim=-1)
    everyone, first = own, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = gathered(own)
        first = dist.get_rank() * len(own)
    rows = torch.arange(len(own), device=own.device)
    with torch.autocast(own.device.type, enabled=False):
        logits = own @ everyone.T / temperature
    logits = logits.index_put((rows, first + rows), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, first + (rows + len(one)) % len(own))


class SimCLRObjective(SelfSupervisedObjective):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709) of a vision transformer, on class tokens and mean patch tokens.

    Args:
        model: As `SelfSupervisedObjective`, and so are mean and std.
        mean: See there.
        std: See there.
        projection_dim: Width of the vectors that are compared.
        temperature: Of the softmax over similarities.
    """

    card = card_of("simclr")
    discarded = ("projector",)  # the paper throws it away

    def __init__(
        self,
        model: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        projection_dim: int = 128,
        temperature: float = 0.2,
    ) -> None:
        super().__init__(model, mean, std)
        self.temperature = temperature
        width = self.width
        self.projector = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, projection_dim))

    def compare(self, pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `nt_xent`."""
        return nt_xent(*pair, self.temperature)


__all__ = ["SimCLRObjective", "nt_xent"]
