"""Parts of `SiTTransformer2DModel`: positions, attention, the block and the last norm."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

TIME_CHANNELS = 256


def grid_positions(height: int, width: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed sin-cos embedding of a grid of tokens in row-major order (Peebles and Xie 2022, arXiv 2212.09748).

    The first half of the channels tells the column, the second the row; of either, the first half is
    `sin(p f_k)`, the second `cos(p f_k)`, with `f_k = 10000^(-4 k / dim)`. Places are counted in tokens, so a larger
    grid holds the smaller one.

    Args:
        height: Rows of tokens.
        width: Columns.
        dim: Channels, a multiple of 4.
        device: Where to compute.

    Returns:
        `(1, height * width, dim)`, float32, computed in float64 where the device has it.

    Example:
        >>> grid_positions(1, 2, 4)[0, 0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    rates = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=dtype) / (dim // 4))

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, device=device, dtype=dtype)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, height * width, dim)


class SiTAttnProcessor:
    """Self-attention through diffusers' dispatcher, so that `set_attention_backend` and context parallelism act.

    Args:
        dropout: Of the attention probabilities, in training.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens `(B, N, D)` among themselves, of the same shape.

        Raises:
            ValueError: For `encoder_hidden_states`: the layer is no cross-attention.
        """
        if encoder_hidden_states is not None:
            raise ValueError("SiT's attention is self-attention; it takes no encoder_hidden_states.")
        if attn.fused_projections:
            parts = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            parts = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in parts)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class PatchAttentionMixin:
    """Of a network of such attention: its processor, and queries, keys and values in one product."""

    def set_default_attn_processor(self: Any) -> None:
        """Undo `set_attn_processor`: attention through diffusers' dispatcher."""
        self.set_attn_processor(SiTAttnProcessor())

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of a block in one product; for inference."""
        self._set_fused(True)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        self._set_fused(False)

    def _set_fused(self: Any, fuse: bool) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_projections(fuse=fuse)


class SiTBlock(nn.Module):
    """Transformer block whose norms and residuals are scaled, shifted and gated by the condition (adaLN-Zero).

    `(s1, k1, g1, s2, k2, g2) = Linear(SiLU(c))`, then `h += g1 Attn((1 + k1) LN(h) + s1)` and
    `h += g2 MLP((1 + k2) LN(h) + s2)` (Peebles and Xie 2022, arXiv 2212.09748, section 3.2).

    Args:
        dim: D, channels of a token.
        num_attention_heads: Heads of `D / num_attention_heads` channels.
        mlp_ratio: Hidden channels of the MLP, in multiples of D.
        qk_norm: Layer norm of queries and keys.
        condition_size: Channels of the condition; D if None.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        condition_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=dim // num_attention_heads,
            bias=True,
            qk_norm="layer_norm" if qk_norm else None,
            processor=SiTAttnProcessor(),
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))
        self.modulation = nn.Linear(condition_size or dim, 6 * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Tokens `(B, N, D)` under the condition `(B, condition_size)`."""
        parts = self.modulation(functional.silu(temb))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        attended = self.attn(torch.addcmul(shift1, self.norm1(hidden_states), 1 + scale1))
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        out = self.ff(torch.addcmul(shift2, self.norm2(hidden_states), 1 + scale2))
        return torch.addcmul(hidden_states, gate2, out)


class SiTFinalNorm(nn.Module):
    """`(1 + k) LN(h) + s` with `(s, k) = Linear(SiLU(c))`.

    Args:
        dim: D, channels of a token.
        condition_size: Channels of the condition; D if None.
    """

    def __init__(self, dim: int, condition_size: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(condition_size or dim, 2 * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Tokens `(B, N, D)` under the condition `(B, condition_size)`."""
        shift, scale = self.modulation(functional.silu(temb))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(hidden_states), 1 + scale)


__all__ = ["TIME_CHANNELS", "SiTAttnProcessor", "SiTBlock", "SiTFinalNorm", "grid_positions"]
