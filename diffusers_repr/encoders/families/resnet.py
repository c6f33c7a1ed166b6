"""ResNet (He et al. 2015, arXiv 1512.03385) of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.encoders.family import BackboneFamily, register_encoder_family
from diffusers_repr.encoders.stages import Stage, resnet_stages


@register_encoder_family("resnet")
class ResNetFamily(BackboneFamily):
    """Tokens: the last stage's map; global: its mean."""

    model_class = "ResNetModel"

    def stages(self, config: Mapping[str, Any]) -> list[Stage]:
        """See `BackboneFamily`."""
        return resnet_stages(config)
