"""`UViTTransformer2DModel`: U-ViT (arXiv 2209.12152), pixel or latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.denoiser.families.sit import SiTFamily
from diffusers_repr.denoiser.family import Grid
from diffusers_repr.denoiser.family_registry import register_family

_LAYOUT = AttentionLayout("self-attention with time and condition as tokens", "first")


@register_family("UViTTransformer2DModel")
class UViTFamily(SiTFamily):
    """Conditions as a SiT's, as tokens before the image's; text tokens by `embeddings=` or a `TokenConditioner`."""

    attentions = {"blocks.*.attn": _LAYOUT}
    not_image = (*SiTFamily.not_image, "text_embed")

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """The last tokens are the image's."""
        patch = self.multiple()
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), tokens - h * w) if tokens >= h * w else None

    def class_token_at(self) -> int | None:
        """The first, of a network with one."""
        return 0 if self.config.get("class_token") else None

    def image_tokens(self, layout: AttentionLayout, inputs: Mapping[str, Any], tokens: int) -> slice | Tensor:
        """The last of the sequence."""
        height, width = inputs[self.sample_name].shape[-2:]
        return slice(tokens - height * width // self.multiple() ** 2, tokens)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """As a SiT's, and zeros where the network takes text."""
        given = super().example(batch, device)
        if self.config.get("text_dim"):
            shape = (batch, self.config["text_tokens"], self.config["text_dim"])
            given["encoder_hidden_states"] = torch.zeros(shape, device=device)
        return given
