"""`FluxTransformer2DModel`: FLUX.1. Latents are packed two by two into tokens here, so callers see maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser.attention_layouts import SINGLE_TEXT_FIRST, TEXT_FIRST, ProcessorRule
from diffusers_repr.denoiser.family import BatchLanes, Grid, PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_PROCESSORS = {
    "FluxAttnProcessor": ProcessorRule(rotary=True, fused=True),
    "FluxIPAdapterAttnProcessor": ProcessorRule(rotary=True, fused=True, image_prompt="beside"),
}


@register_family("FluxTransformer2DModel")
class FluxFamily(PatchTransformerFamily):
    """Two-stream blocks, then single-stream blocks over text and image; the image tokens are read."""

    conditioning = "text"
    joins = True
    unbatched: tuple[str, ...] = ("img_ids", "txt_ids")
    not_image = (*PatchTransformerFamily.not_image, "pos_embed")
    stacks = ("transformer_blocks", "single_transformer_blocks")
    block_outputs = {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1, "FluxAttention": 0}
    attentions = {
        "transformer_blocks.*.attn": replace(TEXT_FIRST, processors=_PROCESSORS),
        "single_transformer_blocks.*.attn": replace(SINGLE_TEXT_FIRST, processors=_PROCESSORS),
    }

    def channels(self) -> int:
        """A token holds 2 x 2 latent pixels."""
        return int(self.config["in_channels"]) // 4

    def size(self) -> tuple[int, int]:
        """1024 pixels: the config has no size, the pipeline takes 128 latent pixels."""
        return 128, 128

    def multiple(self) -> int:
        """The packing."""
        return 2

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """In [0, 1], in the input's dtype as the pipeline has it; the network multiplies by 1000 itself."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return timestep.to(x_t.dtype).expand(x_t.shape[0]) / 1000

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Packed latents; image position ids for the input's own size if the condition holds none."""
        tokens = functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
        inputs = {"hidden_states": tokens, "timestep": self.timestep(level, x_t), **condition}
        ids = inputs.get("img_ids")
        if ids is None:
            inputs["img_ids"] = self.image_ids(x_t.shape[2] // 2, x_t.shape[3] // 2, x_t.device)
        elif ids.shape[-2] != tokens.shape[1]:
            raise ValueError(
                f"The condition holds positions of {ids.shape[-2]} image tokens, the input {tuple(x_t.shape)} has "
                f"{tokens.shape[1]}: make it for this size, denoiser.condition(..., size=(H, W) in pixels)."
            )
        return inputs

    def output(self, raw: Any, x_t: Tensor) -> Tensor:
        """Unpacked to `(B, C, H, W)`; tokens of reference images are left out."""
        tokens = raw if isinstance(raw, Tensor) else raw[0]
        return _unpacked(tokens, x_t.shape[2] // 2, x_t.shape[3] // 2)

    def sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """Unpacked to `(B, C, H, W)`, of the size that the position ids tell, without reference images."""
        return _unpacked(inputs["hidden_states"][..., : self.token_width()], *self.token_size(inputs))

    def token_width(self) -> int:
        """Channels of a token that are x_t's, without those of inpainting."""
        return int(self.config.get("out_channels") or self.config["in_channels"])

    def token_size(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) of the token grid in a call, by its position ids; a reference image's have another first."""
        ids = inputs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        own = ids[ids[:, 0] == ids[0, 0]]
        height, width = (own[:, 1:3].amax(0) + 1).long().tolist()
        return height, width

    def image_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        """Position ids of a token grid."""
        ids = torch.zeros(height, width, 3, device=device)
        ids[..., 1] = torch.arange(height, device=device)[:, None]
        ids[..., 2] = torch.arange(width, device=device)[None]
        return ids.reshape(-1, 3)

    def with_sample(self, inputs: Mapping[str, Any], x_t: Tensor) -> dict[str, Any]:
        """Packed; further channels of the tokens (inpainting) and tokens of reference images stay."""
        return {**inputs, "hidden_states": _replaced(inputs["hidden_states"], x_t)}

    def with_output(self, raw: Tensor, prediction: Tensor) -> Tensor:
        """Packed; tokens of reference images stay."""
        return _replaced(raw, prediction)

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """Times 1000."""
        return model_timestep * 1000

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not with ControlNet, whose residuals the forward adds between blocks."""
        return inputs.get("controlnet_block_samples") is None and inputs.get("controlnet_single_block_samples") is None

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call; true classifier-free guidance is a second call."""
        return BatchLanes(slice(0, inputs["hidden_states"].shape[0]))

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """Longer sequences are text first, then image."""
        h, w = size[0] // 2, size[1] // 2
        return ((h, w), tokens - h * w) if tokens >= h * w else None

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 text tokens, the pooled CLIP vector and, for guidance-distilled models, the guidance vector."""
        inputs = {
            "encoder_hidden_states": torch.zeros(batch, 512, self.config["joint_attention_dim"], device=device),
            "pooled_projections": torch.zeros(batch, self.config["pooled_projection_dim"], device=device),
            "txt_ids": torch.zeros(512, 3, device=device),
        }
        if self.config.get("guidance_embeds"):
            inputs["guidance"] = torch.zeros(batch, device=device)
        return inputs


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The map in the first tokens `(B, N, 4 C)`: `(B, C, 2 height, 2 width)`."""
    own = tokens[:, : height * width]
    return functional.pixel_shuffle(own.transpose(1, 2).unflatten(2, (height, width)), 2)


def _replaced(tokens: Tensor, value: Tensor) -> Tensor:
    """Tokens that begin with another map `(B, C, H, W)`."""
    packed = functional.pixel_unshuffle(value, 2).flatten(2).transpose(1, 2)
    count, width = packed.shape[1:]
    if tokens.shape[2] > width:
        packed = torch.cat([packed, tokens[:, :count, width:]], 2)
    return torch.cat([packed, tokens[:, count:]], 1) if tokens.shape[1] > count else packed
