"""`AuraFlowTransformer2DModel`: AuraFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import SINGLE_TEXT_FIRST, TEXT_FIRST, AttentionLayout
from diffusers_repr.denoiser.families.text_first import TextFirstFamily
from diffusers_repr.denoiser.family import BatchLanes, lanes_by_halves
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_REGISTERS = 8  # learned tokens that the forward puts before the text


@register_family("AuraFlowTransformer2DModel")
class AuraFlowFamily(TextFirstFamily):
    """Two-stream blocks, then single-stream blocks over eight register tokens, text and image; the image is read."""

    joins = True
    not_image = (*TextFirstFamily.not_image, "time_step_embed", "time_step_proj")
    block_outputs = {"AuraFlowJointTransformerBlock": 1}
    attentions = {
        "joint_transformer_blocks.*.attn": TEXT_FIRST,
        "single_transformer_blocks.*.attn": SINGLE_TEXT_FIRST,
    }
    pipeline_arguments = {"guidance_scale": 1.0}

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """In [0, 1], 1 being noise, in the input's dtype as the pipeline has it."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device) / 1000
        return timestep.to(x_t.dtype).expand(x_t.shape[0])

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """Times 1000."""
        return model_timestep * 1000

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """The pipeline does not tell whether it guides; see `lanes_by_halves`."""
        return lanes_by_halves(pipe, inputs["hidden_states"])

    def image_tokens(self, layout: AttentionLayout, inputs: Mapping[str, Any], tokens: int) -> slice:
        """After the registers and the text."""
        return slice(_REGISTERS + inputs["encoder_hidden_states"].shape[1], tokens)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """256 text tokens."""
        return {"encoder_hidden_states": torch.zeros(batch, 256, self.config["joint_attention_dim"], device=device)}
