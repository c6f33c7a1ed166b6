"""`SanaTransformer2DModel` (Xie et al. 2024, arXiv 2410.10629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import AttentionLayout, ProcessorRule
from diffusers_repr.denoiser.family import PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel


@register_family("SanaTransformer2DModel")
class SanaFamily(PatchTransformerFamily):
    """Linear attention on the latents of a 32-fold autoencoder; cross-attention to text."""

    conditioning = "text"
    attentions = {
        "transformer_blocks.*.attn1": AttentionLayout(
            "linear self-attention", linear=True, processors={"SanaLinearAttnProcessor2_0": ProcessorRule()}
        )
    }
    pipeline_arguments = {"guidance_scale": 1.0, "use_resolution_binning": False}
    null_arguments = {"complex_human_instruction": None}  # the pipeline puts its instruction before prompts only

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """The timestep is multiplied by the model's own `timestep_scale`."""
        inputs = super().inputs(x_t, level, condition)
        inputs["timestep"] = inputs["timestep"] * self.config.get("timestep_scale", 1.0)
        return inputs

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """Divided by the model's `timestep_scale`."""
        return model_timestep / self.config.get("timestep_scale", 1.0)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """300 text tokens."""
        inputs = {"encoder_hidden_states": torch.zeros(batch, 300, self.config["caption_channels"], device=device)}
        if self.config.get("guidance_embeds"):
            inputs["guidance"] = torch.zeros(batch, device=device)
        return inputs
