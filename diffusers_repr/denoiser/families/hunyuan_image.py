"""`HunyuanImageTransformer2DModel`: HunyuanImage 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import IMAGE_FIRST
from diffusers_repr.denoiser.family import BatchLanes, Grid, PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_TWO_LANES = {"pred_cond", "pred_uncond"}


@register_family("HunyuanImageTransformer2DModel")
class HunyuanImageFamily(PatchTransformerFamily):
    """Two-stream blocks, then blocks over image and text, the image first. A guider of the pipeline guides."""

    conditioning = "text"
    not_image = (*PatchTransformerFamily.not_image, "context_embedder_2", "time_guidance_embed", "rope")
    block_outputs = {"HunyuanImageTransformerBlock": 0, "HunyuanImageSingleTransformerBlock": 0}
    attentions = {"transformer_blocks.*.attn": IMAGE_FIRST, "single_transformer_blocks.*.attn": IMAGE_FIRST}
    other_attentions = ("context_embedder*",)  # a refiner of the text

    def size(self) -> tuple[int, int]:
        """2048 pixels: the config has no size, the pipeline takes 64 latent pixels."""
        return 64, 64

    def multiple(self) -> int:
        """The patch size, one number a side in the config."""
        patch = self.config["patch_size"]
        return int(patch if isinstance(patch, int) else patch[-1])

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """In the input's dtype, which the network takes for its embeddings too."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return timestep.to(x_t.dtype).expand(x_t.shape[0])

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """A network that gives the mean velocity of a step is asked for that of an empty one: the velocity itself."""
        inputs = super().inputs(x_t, level, condition)
        if self.config.get("use_meanflow"):
            inputs["timestep_r"] = inputs["timestep"]
        return inputs

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call, the condition first: the guider asks for the null one after it.

        Raises:
            ValueError: For a guider that asks for more, or rescales what it makes.
        """
        for name in ("guider", "ocr_guider"):
            guider = getattr(pipe, name, None)
            # Private in diffusers' guiders: whether one acts, and the names of what it asks for. Without them a guider
            # with more lanes than two would not be refused, and its third would be taken for a null one.
            if guider is None or not getattr(guider, "_enabled", True):
                continue
            asked = set(getattr(guider, "_input_predictions", _TWO_LANES))
            if not asked <= _TWO_LANES:
                raise ValueError(
                    f"The {name} of this {type(pipe).__name__} ({type(guider).__name__}) asks for "
                    f"{', '.join(sorted(asked))}; known are {', '.join(sorted(_TWO_LANES))}. Give the pipeline a "
                    "ClassifierFreeGuidance or an AdaptiveProjectedMixGuidance, or none, and guide that."
                )
            if getattr(guider, "guidance_rescale", 0) > 0:
                raise ValueError(
                    f"The {name} of this {type(pipe).__name__} rescales its own guidance "
                    f"(guidance_rescale={guider.guidance_rescale}), and with it what is added here. Set it to 0; for "
                    "rescaled classifier-free guidance give CFG(scale, rescale=...), which replaces the guider's."
                )
        return BatchLanes(slice(0, inputs["hidden_states"].shape[0]))

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """Longer sequences are image first, then text."""
        patch = self.multiple()
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), 0) if tokens >= h * w else None

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """1128 text tokens, as of both encoders together, and the guidance vector of distilled models."""
        inputs = {
            "encoder_hidden_states": torch.zeros(batch, 1128, self.config["text_embed_dim"], device=device),
            "encoder_attention_mask": torch.ones(batch, 1128, dtype=torch.long, device=device),
        }
        if self.config.get("guidance_embeds"):
            inputs["guidance"] = torch.zeros(batch, device=device)
        return inputs
