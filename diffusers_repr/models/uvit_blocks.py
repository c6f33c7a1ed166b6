"""`UViTBlock`: a pre-norm transformer block, joined with an earlier one by a long skip."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from diffusers_repr.models.sit_blocks import SiTAttnProcessor


class UViTBlock(nn.Module):
    """`h = W [h, skip]` where there is a skip, then `h += Attn(LN(h))` and `h += MLP(LN(h))` (arXiv 2209.12152).

    Args:
        dim: D, channels of a token.
        num_attention_heads: Heads of `D / num_attention_heads` channels.
        mlp_ratio: Hidden channels of the MLP, in multiples of D.
        attention_bias: Whether queries, keys and values have biases.
        skip: Whether it takes the tokens of an earlier block.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        attention_bias: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.skip_proj = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=dim // num_attention_heads,
            bias=attention_bias,
            processor=SiTAttnProcessor(),
        )
        self.norm2 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, activation_fn="gelu", inner_dim=int(dim * mlp_ratio))

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens `(B, N, D)`, with those of an earlier block where it has a skip."""
        if self.skip_proj is not None:
            assert skip is not None
            hidden_states = self.skip_proj(torch.cat([hidden_states, skip], dim=-1))
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


__all__ = ["UViTBlock"]
