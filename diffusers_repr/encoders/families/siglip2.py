"""The image half of SigLIP 2 with native aspect ratios (Tschannen et al. 2025, arXiv 2502.14786)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.encoders.families.siglip import SiglipFamily
from diffusers_repr.encoders.family import register_encoder_family


@register_encoder_family("siglip2", "siglip2_vision_model")
class Siglip2Family(SiglipFamily):
    """As SigLIP; takes patches instead of an image. `siglip2-*-patch16-224` and the like are of type `siglip`."""

    model_class = "Siglip2VisionModel"
    interpolates = False

    def side(self, config: Any) -> int | None:
        """The side of a square of `num_patches` patches, if they make one."""
        cells = round(config.num_patches**0.5)
        return cells * self.patch(config) if cells**2 == config.num_patches else None

    def inputs(self, model: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """Patches `(B, N, patch * patch * C)` with channels last, their grid, and a mask of ones."""
        patch, rows = self.patch(model.config), pixels.shape[0]
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        cells = pixels.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))  # B, C, h, p, w, p
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(rows, grid[0] * grid[1], -1)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
            "spatial_shapes": torch.tensor([grid] * rows),
        }
