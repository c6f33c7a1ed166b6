"""Dispersive loss (Wang and He 2025, arXiv 2506.09027): hidden states of a batch pushed apart, without a teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation, full_precision, widen


def dispersive_loss(hidden: Tensor, temperature: float = 0.5) -> Tensor:
    """`log mean_ij exp(-|h_i - h_j|^2 / (D temperature))`, the InfoNCE form with squared distances.

    The mean is over all ordered pairs of the batch, a sample with itself included, so the value lies between
    `-log B` (all far apart) and 0 (all equal).

    Args:
        hidden: `(B, ...)`; what follows the batch is flattened to D numbers.
        temperature: tau.

    Example:
        >>> float(dispersive_loss(torch.ones(3, 4)))
        0.0
    """
    with full_precision(hidden.device):
        flat = widen(hidden).flatten(1)
        squares = F.pdist(flat).square() / flat.shape[1]
        own = squares.new_zeros(len(flat))
        return torch.logsumexp(torch.cat([squares, squares, own]) / -temperature, 0) - 2 * math.log(len(flat))


class DispersiveLoss(AuxiliaryLoss):
    """The dispersive loss of one layer.

    The defaults are those that its repository's README gives for the JAX code; they were not run here. The PyTorch
    code takes weight 0.25, temperature 1 and the last layer. The batch is the one of a process.

    Args:
        layer: Path; the block at a quarter of the depth if None.
        weight: lambda.
        temperature: tau.
    """

    def __init__(self, layer: str | None = None, weight: float = 0.5, temperature: float = 0.5) -> None:
        super().__init__("dispersive", weight)
        if not temperature > 0:
            raise ValueError(f"The temperature must be positive; got {temperature}.")
        self.layer, self.temperature = layer, temperature

    def attach(self, host: LossHost) -> None:
        """Find the layer."""
        if self.layer is None:
            blocks = host.denoiser.family.stack(host.network)
            self.layer = blocks[max(1, len(blocks) // 4) - 1]
        host.layer(self.layer)
        self.layers = (self.layer,)

    def forward(self, seen: Observation) -> Tensor:
        """Over the samples of the micro-batch."""
        return dispersive_loss(seen.layers[self.layers[0]].tokens(), self.temperature)

    def describe(self) -> dict[str, Any]:
        """With the temperature."""
        return {**super().describe(), "temperature": self.temperature}


__all__ = ["DispersiveLoss", "dispersive_loss"]
