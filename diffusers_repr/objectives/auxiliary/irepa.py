"""iREPA (arXiv 2512.10794): REPA with spatially standardised targets and a projector that is a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_repr.heads.projector import ProjectorKind
from diffusers_repr.objectives.auxiliary.alignment import AlignmentLoss
from diffusers_repr.objectives.matching import MatchGrid


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


class SpatialAlignmentLoss(AlignmentLoss):
    """Alignment as in iREPA; weight, gamma and projector are those of its repository.

    Args:
        layer: As `AlignmentLoss`.
        weight: lambda.
        match_grid: As `AlignmentLoss`.
        projector_dim: Hidden width of the projectors, of the kind `mlp`.
        projector_kind: `conv`, or `mlp` as REPA.
        projector_kernel: Side of the convolution: 3 in the repository's README and its code on pixels; its code on
            latents has 1 unless told.
        spatial_norm: gamma of `standardize_spatially`; None: the targets as they are.
        stop_step: As `AlignmentLoss`.
    """

    def __init__(
        self,
        layer: str | None = None,
        weight: float = 1.0,
        match_grid: MatchGrid | None = None,
        projector_dim: int = 2048,
        *,
        projector_kind: ProjectorKind = "conv",
        projector_kernel: int = 3,
        spatial_norm: float | None = 0.6,
        stop_step: int | None = None,
    ) -> None:
        super().__init__(layer, weight, match_grid, projector_dim, stop_step=stop_step)
        self.projector |= {"kind": projector_kind, "kernel_size": projector_kernel}
        self.spatial_norm = spatial_norm

    def target(self, features: Tensor) -> Tensor:
        """Standardised over the tokens."""
        return features if self.spatial_norm is None else standardize_spatially(features, self.spatial_norm)

    def describe(self) -> dict[str, Any]:
        """With gamma."""
        return {**super().describe(), "spatial_norm": self.spatial_norm}


__all__ = ["SpatialAlignmentLoss", "standardize_spatially"]
