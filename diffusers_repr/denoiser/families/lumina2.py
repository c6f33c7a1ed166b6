"""`Lumina2Transformer2DModel`: Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import PLAIN, SINGLE_TEXT_FIRST, AttentionLayout
from diffusers_repr.denoiser.families.text_first import TextFirstFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel


class _FullMask(Tensor):
    """A mask of ones without storage that still tells its sums, of which the forward makes a list."""

    def sum(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.full(self.shape[:1], self.shape[1])


@register_family("Lumina2Transformer2DModel")
class Lumina2Family(TextFirstFamily):
    """Blocks over the image alone, then over caption and image. Time and velocity run from noise to image there."""

    not_image = (*TextFirstFamily.not_image, "context_refiner", "time_caption_embed", "rope_embedder")
    batched = ("image_rotary_emb",)
    stacks = ("layers",)
    attentions = {"noise_refiner.*.attn": PLAIN, "layers.*.attn": SINGLE_TEXT_FIRST}
    other_attentions = ("context_refiner.*",)
    pipeline_arguments = {"guidance_scale": 1.0}

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """`1 - t / 1000`: 0 is noise."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return (1 - timestep / 1000).expand(x_t.shape[0])

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """The inverse."""
        return (1 - model_timestep) * 1000

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """As given.

        Raises:
            ValueError: For captions of unequal lengths: the image would stand at another place in each row.
        """
        mask = condition.get("encoder_attention_mask")
        if mask is not None:
            lengths = mask.sum(1)
            if not bool((lengths == lengths[0]).all()):
                raise ValueError(
                    f"The captions have {sorted(set(lengths.tolist()))} tokens: the image would stand at another "
                    "place in each row of the sequence. Give a batch captions of one length, or one at a time."
                )
        return super().inputs(x_t, level, condition)

    def output(self, raw: Any, x_t: Tensor) -> Tensor:
        """The negative of what the network gives, as the pipeline takes it."""
        return -super().output(raw, x_t)

    def with_output(self, raw: Tensor, prediction: Tensor) -> Tensor:
        """The negative again."""
        return super().with_output(raw, -prediction)

    def image_tokens(self, layout: AttentionLayout, inputs: Mapping[str, Any], tokens: int) -> slice | Tensor:
        """After each row's own caption; what a shorter row leaves stands behind its image."""
        lengths = inputs["encoder_attention_mask"].sum(1)
        image = inputs["hidden_states"].shape[2] * inputs["hidden_states"].shape[3] // self.multiple() ** 2
        if int(lengths.min()) + image == tokens:  # all as long as the longest
            return slice(tokens - image, tokens)
        return lengths[:, None] + torch.arange(image, device=lengths.device)

    def sampler_value(self, given: Tensor, value: Tensor) -> Tensor:
        """The pipeline has turned the sign before its scheduler sees it."""
        return super().with_output(given, value)

    def null_call(self, pipe: Any, text: str) -> dict[str, Any]:
        """The pipeline puts its system prompt before prompts, not before negative ones."""
        with torch.no_grad():
            _, _, embeds, mask = pipe.encode_prompt("", negative_prompt=text, do_classifier_free_guidance=True)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """256 caption tokens."""
        mask = torch.ones(batch, 256, dtype=torch.long, device=device)
        return {
            "encoder_hidden_states": torch.zeros(batch, 256, self.config["cap_feat_dim"], device=device),
            "encoder_attention_mask": mask.as_subclass(_FullMask) if mask.is_meta else mask,
        }
