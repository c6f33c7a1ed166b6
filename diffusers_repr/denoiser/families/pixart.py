"""`PixArtTransformer2DModel`: PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_repr.denoiser.attention_layouts import SELF
from diffusers_repr.denoiser.default_layers import SECOND_BLOCK
from diffusers_repr.denoiser.family import (
    BatchLanes,
    PatchTransformerFamily,
    lanes_by_halves,
)
from diffusers_repr.denoiser.family_registry import register_family


@register_family("PixArtTransformer2DModel")
class PixArtFamily(PatchTransformerFamily):
    """Cross-attention to T5 tokens; learned variance split off."""

    conditioning = "text"
    joins = True
    attentions = {"transformer_blocks.*.attn1": SELF}
    layer_defaults = {"pag": SECOND_BLOCK}
    early_rows = {"adaln_single": 1}
    # Binning would move the input to the nearest trained aspect ratio.
    pipeline_arguments = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """The pipeline does not tell whether it guides; see `lanes_by_halves`."""
        return lanes_by_halves(pipe, inputs["hidden_states"])

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """300 text tokens; resolution and aspect ratio where the model takes them (alpha at 1024)."""
        use = self.config.get("use_additional_conditions")
        if use is None:
            use = self.config["sample_size"] == 128
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if use:
            added = {
                "resolution": torch.zeros(batch, 2, device=device),
                "aspect_ratio": torch.zeros(batch, 1, device=device),
            }
        return {
            "encoder_hidden_states": torch.zeros(batch, 300, self.config["caption_channels"], device=device),
            "added_cond_kwargs": added,
        }
