"""`QwenImageTransformer2DModel`: Qwen-Image (arXiv 2508.02324)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser.attention_layouts import TEXT_FIRST
from diffusers_repr.denoiser.families.flux import FluxFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel


@register_family("QwenImageTransformer2DModel")
class QwenImageFamily(FluxFamily):
    """Two-stream blocks all through; latents are packed as FLUX's. The image's size is an input by itself."""

    unbatched = ("img_shapes",)
    not_image = (
        *FluxFamily.not_image,
        "txt_norm",
        "txt_in",
        "txt_mod",
        "txt_norm1",
        "txt_norm2",
        "txt_mlp",
        "img_mod",
    )
    block_outputs = {"QwenImageTransformerBlock": 1}
    attentions = {"transformer_blocks.*.attn": TEXT_FIRST}
    pipeline_arguments = {"true_cfg_scale": 1.0}

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Packed latents and the size of each row's token grid; sizes of reference images stay behind it."""
        tokens = functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
        own = (1, x_t.shape[2] // 2, x_t.shape[3] // 2)
        given = (condition.get("img_shapes") or [[own]])[0]
        if tuple(given[0]) != own:
            raise ValueError(
                f"The condition is for {given[0][1]} x {given[0][2]} image tokens, the input {tuple(x_t.shape)} has "
                f"{own[1]} x {own[2]}: make it for this size, denoiser.condition(..., size=(H, W) in pixels)."
            )
        timestep = self.timestep(level, x_t)
        inputs = {"hidden_states": tokens, "timestep": timestep, **condition, "img_shapes": [given] * x_t.shape[0]}
        text = condition.get("encoder_hidden_states")
        if text is not None and _is_told_lengths():
            inputs["txt_seq_lens"] = [text.shape[1]] * x_t.shape[0]
        return inputs

    def token_width(self) -> int:
        """`out_channels` counts those of a latent pixel."""
        return int(self.config["patch_size"]) ** 2 * int(self.config["out_channels"])

    def token_size(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """As the first of the sizes says."""
        _, height, width = inputs["img_shapes"][0][0]
        return int(height), int(width)

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not with ControlNet, nor where reference images have a modulation of their own, as further rows."""
        return inputs.get("controlnet_block_samples") is None and not self.config.get("zero_cond_t")

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 text tokens."""
        inputs = {"encoder_hidden_states": torch.zeros(batch, 512, self.config["joint_attention_dim"], device=device)}
        if self.config.get("guidance_embeds"):
            inputs["guidance"] = torch.zeros(batch, device=device)
        return inputs


@functools.cache
def _is_told_lengths() -> bool:
    """Whether the network is told of how many tokens the text is, as up to diffusers 0.36; later it counts them."""
    from diffusers.models.transformers import transformer_qwenimage

    return not hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")
