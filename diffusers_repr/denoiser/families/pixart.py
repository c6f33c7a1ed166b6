"""`PixArtTransformer2DModel`: PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_repr.denoiser.family import PatchTransformerFamily, register_family


@register_family("PixArtTransformer2DModel")
class PixArtFamily(PatchTransformerFamily):
    """Cross-attention to T5 tokens; learned variance split off."""

    conditioning = "text"
    joins = True
    early_rows = {"adaln_single": 1}
    # Binning would move the input to the nearest trained aspect ratio.
    pipeline_arguments = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def example(self, config: Mapping[str, Any], batch: int, device: str) -> dict[str, Any]:
        """300 text tokens; resolution and aspect ratio where the model takes them (alpha at 1024)."""
        use = config.get("use_additional_conditions")
        if use is None:
            use = config["sample_size"] == 128
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if use:
            added = {
                "resolution": torch.zeros(batch, 2, device=device),
                "aspect_ratio": torch.zeros(batch, 1, device=device),
            }
        return {
            "encoder_hidden_states": torch.zeros(batch, 300, config["caption_channels"], device=device),
            "added_cond_kwargs": added,
        }
