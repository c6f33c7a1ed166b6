"""`SD3Transformer2DModel` (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from diffusers_repr.denoiser.family import PatchTransformerFamily, register_family


@register_family("SD3Transformer2DModel")
class SD3Family(PatchTransformerFamily):
    """Two streams with joint attention; the image stream is read."""

    conditioning = "text"
    joins = True
    pipeline_arguments = {"guidance_scale": 1.0}

    def joins_at(self, config: Mapping[str, Any], inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not with ControlNet, whose residuals the forward adds between blocks."""
        return inputs.get("block_controlnet_hidden_states") is None

    def example(self, config: Mapping[str, Any], batch: int, device: str) -> dict[str, Any]:
        """77 CLIP and 256 T5 tokens, and the pooled CLIP vector."""
        return {
            "encoder_hidden_states": torch.zeros(batch, 333, config["joint_attention_dim"], device=device),
            "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], device=device),
        }
