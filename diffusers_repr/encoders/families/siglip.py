"""The image half of SigLIP (Zhai et al. 2023, arXiv 2303.15343), and of SigLIP 2 at a fixed size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family
from diffusers_repr.encoders.preprocessing import HALF, Statistics


@register_encoder_family("siglip", "siglip_vision_model")
class SiglipFamily(EncoderFamily):
    """Patch tokens after the final norm; global: the attention-pooled vector, or the mean where there is no head."""

    model_class = "SiglipVisionModel"
    blocks = ("encoder.layers", "vision_model.encoder.layers")
    class_token = False
    statistics = Statistics(HALF, HALF)

    def global_features(self, output: Any) -> Tensor | None:
        """What the pooling head gives."""
        return output.pooler_output
