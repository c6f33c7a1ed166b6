"""`Flux2Transformer2DModel`: FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import SINGLE_TEXT_FIRST, TEXT_FIRST
from diffusers_repr.denoiser.families.flux import FluxFamily
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.denoiser.family_registry import register_family


@register_family("Flux2Transformer2DModel")
class Flux2Family(FluxFamily):
    """As FLUX.1, with four position ids a token, one modulation for all blocks, and attention fused with the MLP."""

    not_image = (
        *FluxFamily.not_image,
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
    block_outputs = {"Flux2TransformerBlock": 1, "Flux2SingleTransformerBlock": 1, "Flux2Attention": 0}
    attentions = {"transformer_blocks.*.attn": TEXT_FIRST, "single_transformer_blocks.*.attn": SINGLE_TEXT_FIRST}

    def image_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        """(time, row, column, layer) of each token, `(1, N, 4)`."""
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return torch.stack(torch.meshgrid(zero, rows, columns, zero, indexing="ij"), dim=-1).reshape(1, -1, 4)

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """As FLUX.1's.

        Raises:
            ValueError: Where keys and values of reference images are kept between calls.
        """
        if inputs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"{type(pipe).__name__} keeps keys and values of reference images between calls (kv_cache_mode), "
                "which lanes would mix. Use the pipeline without this cache."
            )
        return super().lanes(pipe, inputs)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 text tokens, and the guidance vector."""
        ids = torch.zeros(1, 512, 4, dtype=torch.long, device=device)
        return {
            "encoder_hidden_states": torch.zeros(batch, 512, self.config["joint_attention_dim"], device=device),
            "txt_ids": ids,
            "guidance": torch.zeros(batch, device=device),
        }
