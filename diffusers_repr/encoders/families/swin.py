"""Swin (Liu et al. 2021, arXiv 2103.14030) of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_repr.encoders.family import BackboneFamily, register_encoder_family
from diffusers_repr.encoders.stages import Stage, swin_stages


@register_encoder_family("swin")
class SwinFamily(BackboneFamily):
    """Tokens: those of the last stage before the final norm; global: the mean of those after it."""

    model_class = "SwinModel"

    def stages(self, config: Mapping[str, Any]) -> list[Stage]:
        """See `BackboneFamily`."""
        return swin_stages(config)

    def inputs(self, model: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """Sizes other than the configured one are let through."""
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}
