"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and ConvNeXt V2 (arXiv 2301.00808) of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.encoders.family import BackboneFamily, register_encoder_family
from diffusers_repr.encoders.stages import Stage, convnext_stages


@register_encoder_family("convnext", "convnextv2")
class ConvNextFamily(BackboneFamily):
    """Tokens: the last stage's map; global: the layer norm of its mean."""

    model_class = "AutoModel"

    def stages(self, config: Mapping[str, Any]) -> list[Stage]:
        """See `BackboneFamily`."""
        return convnext_stages(config)
