"""`AttentionHead`: a small transformer reads all places of all maps by a class token; GDC's head, and DifFormer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.map_classifier import MapClassifier
from diffusers_repr.models.layers import CastBatchNorm2d, CastLayerNorm, CastLinear, Projection

NORMS = ("layer", "batch")


class TokenBlock(nn.Module):
    """A transformer block that normalises first: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with GELU.

    Args:
        width: D of a token.
        heads: Of the attention.
        mlp_width: Between the linear layers.
    """

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = CastLayerNorm(width), CastLayerNorm(width)
        self.to_q, self.to_kv = CastLinear(width, width, bias=False), CastLinear(width, 2 * width, bias=False)
        self.to_out = CastLinear(width, width)
        self.fc1, self.fc2 = CastLinear(width, mlp_width), CastLinear(mlp_width, width)

    def forward(self, tokens: Tensor, count: int | None = None) -> Tensor:
        """`(B, N, D)` to `(B, count, D)`: all tokens are attended to, and of the result the first `count` are made."""
        normed = self.norm1(tokens)
        key, value = self.to_kv(normed).chunk(2, dim=-1)
        query = self.to_q(normed[:, :count])
        parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        attended = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        tokens = tokens[:, :count] + self.to_out(attended)
        return tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))


@register_head("attention")
class AttentionHead(MapClassifier, ModelMixin, ConfigMixin):
    """DifFormer (Mukhopadhyay et al. 2023, arXiv 2311.17921); of one layer at one level, GDC's attention head.

    Each layer has a projector, the same at all levels: means over cells down to its size, a norm, a linear layer to
    `width`; what it gives are tokens, without positions. At each level the tokens of all layers are joined, a class
    token is put first, `num_layers` transformer blocks follow, the same at all levels, and the class token is taken.
    Those of all levels, side by side, go through a linear layer.

    Levels stand in the batch, and the last block computes its class token alone: what is left out acts on nothing.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        sizes: (H, W) of each in cells, as the head reads it; larger maps are averaged over cells. With
            `norm="layer"` there is a weight for each of its values.
        num_classes: K.
        levels: Noise levels, each with all of the layers.
        width: D; 1024 in the paper's code.
        num_layers: Transformer blocks.
        num_attention_heads: Of each of their attentions.
        mlp_ratio: Width of the blocks' MLP, in D.
        norm: `layer`: over channels and places of a map; `batch`: a channel's over batch and places, with the
            statistics of each level on its own in training.

    Raises:
        ValueError: For layers, channels, sizes or widths that do not fit.

    Example:
        >>> head = AttentionHead(["a", "b"], [8, 4], [[2, 2], [3, 3]], num_classes=5, levels=2, width=16)
        >>> head({"b": torch.rand(2, 1, 4, 6, 6), "a": torch.rand(2, 1, 8, 2, 2)}).shape
        torch.Size([1, 5])
    """

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        sizes: Sequence[Sequence[int]],
        num_classes: int,
        levels: int = 1,
        width: int = 1024,
        num_layers: int = 2,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        self.check_arguments(width=width, num_layers=num_layers, num_attention_heads=num_attention_heads)
        if width % num_attention_heads:
            raise ValueError(f"width={width} cannot be divided among {num_attention_heads} heads.")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}; expected one of {', '.join(NORMS)}.")
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0; got {mlp_ratio!r}.")
        self.norms = nn.ModuleList(
            CastBatchNorm2d(count) if norm == "batch" else CastLayerNorm([count, *size])
            for count, size in zip(channels, sizes, strict=True)
        )
        self.projections = nn.ModuleList(Projection(count, width) for count in channels)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            TokenBlock(width, num_attention_heads, int(width * mlp_ratio)) for _ in range(num_layers)
        )
        self.linear = CastLinear(width * levels, num_classes)

    def classify(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Logits `(B, num_classes)` of what `take` gave."""
        levels = int(self.config["levels"])
        parts = []
        for path, norm, projection in zip(self.config["layers"], self.norms, self.projections, strict=True):
            normed = torch.cat([norm(level) for level in maps[path]])  # a level's statistics are its own
            parts.append(projection(normed).flatten(2).mT)
        first = self.class_token.to(parts[0].dtype).expand(len(parts[0]), -1, -1)
        tokens = torch.cat([first, *parts], dim=1)
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, 1 if number == len(self.blocks) else None)
        return self.linear(torch.cat(tokens[:, 0].chunk(levels), dim=1))


__all__ = ["AttentionHead", "TokenBlock"]
