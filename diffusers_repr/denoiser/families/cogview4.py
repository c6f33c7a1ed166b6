"""`CogView4Transformer2DModel`: CogView 4."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_repr.denoiser.attention_layouts import TEXT_FIRST
from diffusers_repr.denoiser.families.text_first import TextFirstFamily
from diffusers_repr.denoiser.family_registry import register_family


@register_family("CogView4Transformer2DModel")
class CogView4Family(TextFirstFamily):
    """Text and image tokens through the same weights; the image is read. Three sizes are inputs, as in SDXL."""

    not_image = (*TextFirstFamily.not_image, "rope", "time_condition_embed", "text_proj", "norm_context")
    block_outputs = {"CogView4PatchEmbed": 0, "CogView4TransformerBlock": 0}
    attentions = {"transformer_blocks.*.attn1": TEXT_FIRST}
    pipeline_arguments = {"guidance_scale": 1.0}

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """224 text tokens, and the sizes."""
        sizes = {
            name: torch.zeros(batch, 2, device=device) for name in ("original_size", "target_size", "crop_coords")
        }
        return {
            "encoder_hidden_states": torch.zeros(batch, 224, self.config["text_embed_dim"], device=device),
            **sizes,
        }
