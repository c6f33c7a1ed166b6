"""`IdentityAssigner`: the representation itself as the condition, standardised."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.assign.base import Assigner, register_assigner


@register_assigner("identity")
class IdentityAssigner(Assigner):
    """Each feature standardised over the training images: what RCG generates and RDM is conditioned on.

    `c = (z - mean) / std` by column, as the representations of RCG (Li et al. 2023, arXiv 2312.03701) are; columns
    that do not vary are left at 0. The null condition is the vector of zeros, which is the mean image.

    Args:
        in_features: D of the features.
        normalize: Scale features to length 1 first.

    Example:
        >>> assigner = IdentityAssigner(2).fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> assigner.assign(torch.tensor([[2.0, 5.0]]))
        tensor([[1., 0.]])
    """

    gives = "vector"

    mean: Tensor
    std: Tensor

    @register_to_config
    def __init__(self, in_features: int, normalize: bool = False) -> None:
        super().__init__()
        self.make_state(in_features, normalize)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))

    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """Mean and standard deviation (of the population) by column, in float64."""
        wide = features.double()
        std = wide.std(0, correction=0)
        self.mean.copy_(wide.mean(0))
        self.std.copy_(torch.where(std > 1e-6 * wide.abs().amax(0), std, torch.ones_like(std)))

    def assign_prepared(self, features: Tensor) -> Tensor:
        """`(B, D)`, float32."""
        return (features - self.mean.float()) / self.std.float()

    @property
    def null(self) -> Tensor:
        """Zeros `(D,)`."""
        return torch.zeros_like(self.mean, dtype=torch.float32)

    def check_values(self) -> None:
        """Refuse a `std` that is not above 0."""
        if not self.std.is_meta and not bool((self.std > 0).all()):
            raise ValueError("The std of this IdentityAssigner has values that are not above 0.")


__all__ = ["IdentityAssigner"]
