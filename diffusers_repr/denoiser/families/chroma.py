"""`ChromaTransformer2DModel`: Chroma, after FLUX.1 schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import SINGLE_TEXT_FIRST, TEXT_FIRST
from diffusers_repr.denoiser.families.flux import FluxFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel


@register_family("ChromaTransformer2DModel")
class ChromaFamily(FluxFamily):
    """As FLUX; the text is masked, and all modulation comes from one small network."""

    not_image = (*FluxFamily.not_image, "distilled_guidance_layer")
    block_outputs = {"ChromaTransformerBlock": 1}
    attentions = {"transformer_blocks.*.attn": TEXT_FIRST, "single_transformer_blocks.*.attn": SINGLE_TEXT_FIRST}
    pipeline_arguments = {"guidance_scale": 1.0}

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """As FLUX's; text positions are zeros if the condition holds none."""
        inputs = super().inputs(x_t, level, condition)
        if inputs.get("txt_ids") is None:
            inputs["txt_ids"] = torch.zeros(inputs["encoder_hidden_states"].shape[1], 3, device=x_t.device)
        return inputs

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 text tokens."""
        return {"encoder_hidden_states": torch.zeros(batch, 512, self.config["joint_attention_dim"], device=device)}
