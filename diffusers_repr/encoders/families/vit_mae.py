"""The encoder of masked autoencoders (He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.encoders.family import EncoderFamily, register_encoder_family


@register_encoder_family("vit_mae")
class ViTMAEFamily(EncoderFamily):
    """All patches in their order, of the last block without norm, as REPA; global: the class token of that block."""

    model_class = "ViTMAEModel"
    positions = "embeddings"
    final_norm = False

    def loading(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing is masked."""
        return {"mask_ratio": 0.0}

    def inputs(self, model: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """With `noise` in rising order: the network sorts patches by it, also where it masks none."""
        patch = self.patch(model.config)
        count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
        noise = torch.arange(count, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
        return {**super().inputs(model, pixels), "noise": noise}
