"""Plain vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929): DINO, MoCo v3, MSN and supervised ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family


@register_encoder_family("vit")
class ViTFamily(EncoderFamily):
    """Patch tokens after the final norm; global: the class token after it, never the pooler's projection."""

    model_class = "ViTModel"
    positions = "embeddings"

    def loading(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """No pooler: self-supervised checkpoints do not have one."""
        return {"add_pooling_layer": False}
