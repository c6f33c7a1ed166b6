"""`NoisyBatch`: one micro-batch on its way through the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives.base import Batch


@dataclass
class NoisyBatch:
    """One micro-batch on its way through the network.

    Attributes:
        x0: Clean pixels or latents (B, c, h, w), float32.
        noise: Standard normal, as `x0`.
        level: Resolved, one a sample.
        x_t: `alpha x0 + sigma noise`.
        target: What the network should return.
        condition: Its further inputs by name, labels already dropped.
        batch: The batch it came from.
    """

    x0: Tensor
    noise: Tensor
    level: NoiseLevel
    x_t: Tensor
    target: Tensor
    condition: dict[str, Any]
    batch: Batch = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of x_0; (1, 1) of vectors."""
        return (self.x0.shape[2], self.x0.shape[3]) if self.x0.ndim == 4 else (1, 1)


__all__ = ["NoisyBatch"]
