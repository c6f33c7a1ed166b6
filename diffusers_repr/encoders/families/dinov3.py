"""DINOv3 vision transformers (Simeoni et al. 2025, arXiv 2508.10104)."""

from __future__ import annotations

from typing import Any

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family


@register_encoder_family("dinov3_vit")
class Dinov3Family(EncoderFamily):
    """Patch tokens after the final norm, registers dropped; global: the class token. Rotary positions fit any size."""

    model_class = "DINOv3ViTModel"
    blocks = ("model.layer", "layer")
    interpolates = False

    def prefix(self, config: Any) -> int:
        """Class token and registers."""
        return 1 + int(config.num_register_tokens)
