"""`NullTokens`: the token set that stands for no condition, learned or drawn once."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput, packed


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
        >>> null = NullTokens(dim=2, learned=False)
        >>> null(torch.zeros(2, 3, 2), torch.tensor([False, True]))[:, :, 0].ne(0)
        tensor([[False, False, False],
                [ True,  True,  True]])
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

    def forward(
        self, tokens: Tensor, drop_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """Token sets `(B, k, D)`, those of dropped samples the null ones.

        Args:
            tokens: `(B, k, D)`.
            drop_mask: `(B,)`, boolean; None: no sample.
            return_dict: None for the tensor itself, True for an output with `sample`, False for a tuple.

        Raises:
            ValueError: For another width, and another number of tokens than it has, if that is not 1.
        """
        own, width = self.tokens.shape
        if tokens.ndim != 3 or tokens.shape[2] != width:
            raise ValueError(f"NullTokens takes tokens (B, k, {width}); got {tuple(tokens.shape)}.")
        if own not in (1, tokens.shape[1]):
            raise ValueError(
                f"The null condition has {own} tokens, and the sets {tokens.shape[1]}: a set has as many, or the null "
                "condition one, which stands in every place."
            )
        if drop_mask is None:
            drop_mask = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        # Always a choice, so that the null has a gradient in every step, as DDP wants.
        chosen = torch.where(drop_mask[:, None, None], self.tokens.to(tokens), tokens)
        return packed(chosen, SampleOutput, return_dict)


__all__ = ["NullTokens"]
