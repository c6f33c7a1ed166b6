"""`AuraFlowTransformer2DModel`: AuraFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.family import (
    BatchLanes,
    PatchTransformerFamily,
    equal_halves,
    null_first,
    register_family,
)
from diffusers_repr.noise import NoiseLevel


@register_family("AuraFlowTransformer2DModel")
class AuraFlowFamily(PatchTransformerFamily):
    """Two-stream blocks, then single-stream blocks over eight register tokens, text and image; the image is read."""

    conditioning = "text"
    joins = True
    not_image = (*PatchTransformerFamily.not_image, "time_step_embed", "time_step_proj")
    pipeline_arguments = {"guidance_scale": 1.0}

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """In [0, 1], 1 being noise, in the input's dtype as the pipeline has it."""
        told = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device) / 1000
        return told.to(x_t.dtype).expand(x_t.shape[0])

    def training_timestep(self, config: Mapping[str, Any], told: Tensor) -> Tensor:
        """Times 1000."""
        return told * 1000

    def lanes(self, pipe: Any, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> BatchLanes:
        """The pipeline does not tell whether it guides: a batch of two equal halves is null and condition.

        Not to be asked where its own guidance is known to be off: samples that start from equal latents would be
        taken for a guided batch.
        """
        value = inputs["hidden_states"]
        if pipe is not None and equal_halves(value):
            return null_first(value.shape[0])
        return BatchLanes(slice(0, value.shape[0]))

    def grid(
        self, config: Mapping[str, Any], tokens: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], int] | None:
        """Longer sequences are registers and text first, then image."""
        patch = self.multiple(config)
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), tokens - h * w) if tokens >= h * w else None

    def example(self, config: Mapping[str, Any], batch: int, device: str) -> dict[str, Any]:
        """256 text tokens."""
        return {"encoder_hidden_states": torch.zeros(batch, 256, config["joint_attention_dim"], device=device)}
