"""`HunyuanDiT2DModel` (Li et al. 2024, arXiv 2405.08748)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import PLAIN
from diffusers_repr.denoiser.default_layers import LayerDefault
from diffusers_repr.denoiser.family import PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_BASE_PIXELS = 512  # what the rotary positions are scaled to, by the pipeline


@register_family("HunyuanDiT2DModel")
class HunyuanDiTFamily(PatchTransformerFamily):
    """Cross-attention to BERT and T5 tokens; long skips between blocks; learned variance split off."""

    conditioning = "text"
    joins = True
    unbatched = ("image_rotary_emb",)
    not_image = (*PatchTransformerFamily.not_image, "time_extra_emb", "text_embedder")
    attentions = {"blocks.*.attn1": PLAIN}
    layer_defaults = {"pag": LayerDefault(("blocks.1.*",), "blocks.1, diffusers' default")}
    # Binning would move the input to the nearest trained aspect ratio.
    pipeline_arguments = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """In the input's dtype, which the network takes for its embeddings too."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return timestep.to(x_t.dtype).expand(x_t.shape[0])

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """With rotary positions for the input's own size if the condition holds none."""
        inputs = super().inputs(x_t, level, condition)
        patch = self.multiple()
        height, width = x_t.shape[2] // patch, x_t.shape[3] // patch
        rotary = inputs.get("image_rotary_emb")
        if rotary is None:
            inputs["image_rotary_emb"] = self._rotary(height, width, x_t.device)
        elif rotary[0].shape[0] != height * width:
            raise ValueError(
                f"The condition holds positions of {rotary[0].shape[0]} image tokens, the input {tuple(x_t.shape)} "
                f"has {height * width}: make it for this size, denoiser.condition(..., size=(H, W) in pixels)."
            )
        return inputs

    def _rotary(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions as the pipeline makes them: the grid fills a square of the base size, its shorter side centred."""
        base = _BASE_PIXELS // 8 // int(self.config["patch_size"])
        longer = max(height, width)
        spans = [round(base / longer * side) for side in (height, width)]
        tops = [round((base - span) / 2) for span in spans]
        corners = (tuple(tops), tuple(top + span for top, span in zip(tops, spans, strict=True)))
        head = int(self.config["attention_head_dim"])
        cos, sin = get_2d_rotary_pos_embed(head, corners, (height, width), device=device, output_type="pt")
        return cos, sin

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not with ControlNet, whose residuals the forward adds to what the blocks left for the long skips."""
        return inputs.get("controlnet_block_samples") is None

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """The config's text lengths (77 BERT and 256 T5 tokens), sizes and the style."""
        bert, t5 = self.config["text_len"], self.config["text_len_t5"]
        return {
            "encoder_hidden_states": torch.zeros(batch, bert, self.config["cross_attention_dim"], device=device),
            "text_embedding_mask": torch.ones(batch, bert, dtype=torch.long, device=device),
            "encoder_hidden_states_t5": torch.zeros(batch, t5, self.config["cross_attention_dim_t5"], device=device),
            "text_embedding_mask_t5": torch.ones(batch, t5, dtype=torch.long, device=device),
            "image_meta_size": torch.zeros(batch, 6, device=device),
            "style": torch.zeros(batch, dtype=torch.long, device=device),
        }
