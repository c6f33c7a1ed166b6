"""iREPA (arXiv 2512.10794): REPA with spatially standardised targets and a projector that is a convolution.

`REPAObjective(..., **IREPA)` has its settings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Weight, gamma and projector of its repository; the kernel of 3 is said in the README only, the code's default is 1.
IREPA: dict[str, Any] = {
    "coefficient": 1.0,
    "projector_kind": "conv",
    "projector_kernel": 3,
    "spatial_norm": 0.6,
}


def standardize_spatially(tokens: Tensor, gamma: float = 0.6, eps: float = 1e-6) -> Tensor:
    """`(z - gamma mean z) / (std z + eps)`, mean and standard deviation over the tokens of each sample and channel.

    It takes away a share of what all patches of an image have in common, so that the differences between patches
    weigh more.

    Args:
        tokens: `(B, N, D)`, float32 or wider.
        gamma: Share of the mean that is taken away; 0.6 is the default of iREPA's repository, 1 leaves a mean of 0.
        eps: Added to the standard deviation.

    Raises:
        ValueError: For a single token, which has no deviation.

    Example:
        >>> standardize_spatially(torch.tensor([[[1.0], [3.0]]]), gamma=1.0).flatten().tolist()
        [-0.7071062922477722, 0.7071062922477722]
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ValueError(f"Spatial standardisation needs (B, N, D) with N > 1; got {tuple(tokens.shape)}.")
    std, mean = torch.std_mean(tokens, dim=1, keepdim=True)
    return (tokens - gamma * mean) / (std + eps)


__all__ = ["IREPA", "standardize_spatially"]
