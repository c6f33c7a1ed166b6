"""`SD3Transformer2DModel` (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from diffusers_repr.denoiser.attention_layouts import IMAGE_FIRST, SELF, ProcessorRule
from diffusers_repr.denoiser.default_layers import SECOND_BLOCK
from diffusers_repr.denoiser.family import PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family

_PROCESSORS = {
    "JointAttnProcessor2_0": ProcessorRule(masks=False),
    "XFormersJointAttnProcessor": ProcessorRule(own_scale=True),
    "SD3IPAdapterJointAttnProcessor2_0": ProcessorRule(masks=False, image_prompt="inside"),
}


@register_family("SD3Transformer2DModel")
class SD3Family(PatchTransformerFamily):
    """Two streams with joint attention; the image stream is read."""

    conditioning = "text"
    joins = True
    pipeline_arguments = {"guidance_scale": 1.0}
    block_outputs = {"JointTransformerBlock": 1}
    attentions = {
        "transformer_blocks.*.attn": replace(IMAGE_FIRST, processors=_PROCESSORS),
        "transformer_blocks.*.attn2": replace(SELF, processors=_PROCESSORS),  # SD3.5: over the image alone
    }
    layer_defaults = {"pag": SECOND_BLOCK}

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not with ControlNet, whose residuals the forward adds between blocks."""
        return inputs.get("block_controlnet_hidden_states") is None

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """77 CLIP and 256 T5 tokens, and the pooled CLIP vector."""
        return {
            "encoder_hidden_states": torch.zeros(batch, 333, self.config["joint_attention_dim"], device=device),
            "pooled_projections": torch.zeros(batch, self.config["pooled_projection_dim"], device=device),
        }
