"""`UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, Kolors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from diffusers_repr.denoiser.families.unet2d import UNET_BLOCKS, UNET_DEFAULTS
from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.family_registry import register_family


@register_family("UNet2DConditionModel")
class UNet2DConditionFamily(Family):
    """Latent U-Net with cross-attention to text."""

    conditioning = "text"
    joins = True
    read_late = ("encoder_hidden_states", "encoder_attention_mask")
    block_outputs = UNET_BLOCKS
    layer_defaults = UNET_DEFAULTS
    not_image = (*Family.not_image, "encoder_hid_proj")
    pipeline_arguments = {"guidance_scale": 1.0}
    prompts_together = True

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Where the forward adds nothing to a part of the image that has not joined: ControlNet, T2I adapters."""
        if all(unit.startswith("up_blocks") for unit in units):
            return True
        residuals = inputs.get("down_block_additional_residuals") is not None
        alone = residuals and inputs.get("mid_block_additional_residual") is None  # read as an adapter's
        if alone or inputs.get("down_intrablock_additional_residuals") is not None:
            return False
        return not (residuals and any(unit.startswith("down_blocks") for unit in units))

    def late_inputs(self, units: Collection[str]) -> tuple[str, ...]:
        """ControlNet's residual of the middle block."""
        return ("mid_block_additional_residual",) if "mid_block" in units else ()

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """77 text tokens; for SDXL also the pooled text and the six size numbers."""
        width = self.config["cross_attention_dim"]
        width = width[0] if isinstance(width, (list, tuple)) else width
        if self.config.get("encoder_hid_dim"):
            width = self.config["encoder_hid_dim"]
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.zeros(batch, 77, width, device=device)}
        if self.config.get("addition_embed_type") == "text_time":
            time_dim = self.config["addition_time_embed_dim"]
            text = self.config["projection_class_embeddings_input_dim"] - 6 * time_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(batch, text, device=device),
                "time_ids": torch.zeros(batch, 6, device=device),
            }
        if self.config.get("time_cond_proj_dim"):
            inputs["timestep_cond"] = torch.zeros(batch, self.config["time_cond_proj_dim"], device=device)
        return inputs
