"""`NullTokens`: the token set that stands for no condition, learned or drawn once."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin


class NullTokens(ReprModelMixin, ModelMixin, ConfigMixin):
    """What a network conditioned on token sets is given in place of them: the null condition of its guidance.

    A learned one is trained with the network, on the samples whose condition is dropped. One that is not learned is
    drawn from a normal distribution once and kept, as the buffer of RDM's code is (arXiv 2204.11824), whose networks
    have never seen it in training.

    Args:
        dim: D of the tokens.
        count: Tokens in the set; 1 stands in as many places as a condition has tokens.
        learned: Whether it is trained.
        seed: Of its first values.

    Example:
        >>> NullTokens(dim=8)(batch=2, count=4).shape
        torch.Size([2, 4, 8])
    """

    _no_split_modules: list[str] = []

    tokens: Tensor

    @register_to_config
    def __init__(self, dim: int, count: int = 1, learned: bool = True, seed: int = 0) -> None:
        super().__init__()
        check_sizes(dim=dim, count=count)
        values = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
        if learned:
            self.tokens = nn.Parameter(0.02 * values)
        else:
            self.register_buffer("tokens", values)

    def forward(self, batch: int = 1, count: int | None = None) -> Tensor:
        """`(batch, count, D)`; as many tokens as it has if None.

        Raises:
            ValueError: For another number of tokens than it has, if that is not 1.
        """
        own = len(self.tokens)
        if count is not None and own not in (1, count):
            raise ValueError(f"These null tokens are {own}; a condition of {count} needs as many, or 1.")
        return self.tokens.expand(batch, count or own, -1)


__all__ = ["NullTokens"]
