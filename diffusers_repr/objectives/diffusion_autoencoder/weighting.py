"""PDAE's weight of a noise level in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.noise import NoiseLevel


def snr_weights(level: NoiseLevel, gamma: float = 0.1) -> Tensor:
    """`SNR^gamma / (1 + SNR)`, with `SNR = alpha^2 / sigma^2` (PDAE, arXiv 2212.12990, eq. 15); below 1.

    Args:
        level: Resolved.
        gamma: 0.1 in the paper.

    Example:
        >>> from diffusers_repr.noise import NoiseSchedule
        >>> snr_weights(NoiseSchedule("flow", "velocity").resolve(500)).item()
        0.5
    """
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (level.alpha, level.sigma))
    # Of the squares, so that neither end of the process divides by 0.
    a, s = alpha.square(), sigma.square()
    return (a**gamma * s ** (1 - gamma) / (a + s)).float()


__all__ = ["snr_weights"]
