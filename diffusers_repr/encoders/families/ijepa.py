"""I-JEPA (Assran et al. 2023, arXiv 2301.08243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family


@register_encoder_family("ijepa")
class IJepaFamily(EncoderFamily):
    """Patch tokens after the final norm; there is no class token, global is their mean."""

    model_class = "IJepaModel"
    class_token = False

    def loading(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """No pooler."""
        return {"add_pooling_layer": False}
