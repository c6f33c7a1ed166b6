"""`IdentityAssigner`: the representation itself as the condition, standardised."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.assign.base import Assigner, register_assigner

Over = Literal["column", "vector"]


@register_assigner("identity")
class IdentityAssigner(Assigner):
    """The features standardised: what RCG generates and RDM is conditioned on.

    `c = (z - mean) / std`, over the training images column by column, where columns that do not vary are left at 0
    and the vector of zeros is the mean image; or over the entries of each vector by itself, with the unbiased standard
    deviation, as the code of RCG has it (Li et al. 2023, arXiv 2312.03701). The null condition is the vector of zeros.

    Args:
        in_features: D of the features.
        normalize: Scale features to length 1 first.
        over: What mean and standard deviation are of: `column` or `vector`.

    Raises:
        ValueError: For another `over`, and for vectors of one entry by themselves.

    Example:
        >>> assigner = IdentityAssigner(2).fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> assigner.assign(torch.tensor([[2.0, 5.0]]))
        tensor([[1., 0.]])
    """

    gives = "vector"

    mean: Tensor
    std: Tensor

    @register_to_config
    def __init__(self, in_features: int, normalize: bool = False, over: Over = "column") -> None:
        super().__init__()
        if over not in get_args(Over) or (over == "vector" and in_features < 2):
            raise ValueError(
                f"over is one of {', '.join(get_args(Over))}, and a vector needs two entries or more; got {over!r}, "
                f"in_features={in_features}."
            )
        self.make_state(in_features, normalize)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))

    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """Mean and standard deviation (of the population) by column, in float64; nothing of vectors by themselves."""
        if self.config["over"] == "vector":
            return
        wide = features.double()
        std = wide.std(0, correction=0)
        self.mean.copy_(wide.mean(0))
        self.std.copy_(torch.where(std > 1e-6 * wide.abs().amax(0), std, torch.ones_like(std)))

    def assign_prepared(self, features: Tensor) -> Tensor:
        """`(B, D)`, float32.

        Raises:
            ValueError: For a vector whose entries are all the same, by itself.
        """
        if self.config["over"] == "vector":
            return standardize_vectors(features)
        return (features - self.mean.float()) / self.std.float()

    @property
    def null(self) -> Tensor:
        """Zeros `(D,)`."""
        return torch.zeros_like(self.mean, dtype=torch.float32)

    def check_values(self) -> None:
        """Refuse a `std` that is not above 0."""
        if not self.std.is_meta and not bool((self.std > 0).all()):
            raise ValueError("The std of this IdentityAssigner has values that are not above 0.")


def standardize_vectors(vectors: Tensor) -> Tensor:
    """Each of the vectors `(B, D)` with the mean 0 and the unbiased standard deviation 1 over its entries, float32.

    Raises:
        ValueError: For one whose entries are all the same.

    Example:
        >>> standardize_vectors(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.,  0.,  1.]])
    """
    wide = vectors.double()
    std = wide.std(1, keepdim=True)
    constant = (std <= 1e-9 * wide.abs().amax(1, keepdim=True)).flatten().nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"Vectors {constant[:5]} have entries that are all the same; they cannot be standardised.")
    return ((wide - wide.mean(1, keepdim=True)) / std).float()


__all__ = ["IdentityAssigner", "standardize_vectors"]
