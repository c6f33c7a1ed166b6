"""`CogView4Transformer2DModel`: CogView 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_repr.denoiser.family import BatchLanes, PatchTransformerFamily, register_family


@register_family("CogView4Transformer2DModel")
class CogView4Family(PatchTransformerFamily):
    """Text and image tokens through the same weights; the image is read. Three sizes are inputs, as in SDXL."""

    conditioning = "text"
    joins = True
    not_image = (*PatchTransformerFamily.not_image, "rope", "time_condition_embed", "text_proj", "norm_context")
    pipeline_arguments = {"guidance_scale": 1.0}

    def lanes(self, pipe: Any, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call; classifier-free guidance is a second call."""
        return BatchLanes(slice(0, inputs["hidden_states"].shape[0]))

    def grid(
        self, config: Mapping[str, Any], tokens: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], int] | None:
        """Longer sequences are text first, then image."""
        patch = self.multiple(config)
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), tokens - h * w) if tokens >= h * w else None

    def example(self, config: Mapping[str, Any], batch: int, device: str) -> dict[str, Any]:
        """224 text tokens, and the sizes."""
        sizes = {name: torch.zeros(batch, 2, device=device) for name in ("original_size", "target_size", "crop_coords")}
        return {"encoder_hidden_states": torch.zeros(batch, 224, config["text_embed_dim"], device=device), **sizes}
