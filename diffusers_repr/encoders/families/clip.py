"""The image half of CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family
from diffusers_repr.encoders.preprocessing import CLIP_MEAN, CLIP_STD, Statistics


@register_encoder_family("clip", "clip_vision_model")
class CLIPFamily(EncoderFamily):
    """Patch tokens of the last block without norm, as REPA; global: the class token after the norm, not projected."""

    model_class = "CLIPVisionModel"
    blocks = ("encoder.layers", "vision_model.encoder.layers")
    final_norm = False
    statistics = Statistics(CLIP_MEAN, CLIP_STD)

    def global_features(self, output: Any) -> Tensor | None:
        """The class token after `post_layernorm`."""
        return output.pooler_output
