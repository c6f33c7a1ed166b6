"""`Lumina2Transformer2DModel`: Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.family import BatchLanes, PatchTransformerFamily, register_family
from diffusers_repr.noise import NoiseLevel


class _FullMask(Tensor):
    """A mask of ones without storage that still tells its sums, of which the forward makes a list."""

    def sum(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.full(self.shape[:1], self.shape[1])


@register_family("Lumina2Transformer2DModel")
class Lumina2Family(PatchTransformerFamily):
    """Blocks over the image alone, then over caption and image. Time and velocity run from noise to image there."""

    conditioning = "text"
    not_image = (*PatchTransformerFamily.not_image, "context_refiner", "time_caption_embed", "rope_embedder")
    pipeline_arguments = {"guidance_scale": 1.0}

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """`1 - t / 1000`: 0 is noise."""
        told = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return (1 - told / 1000).expand(x_t.shape[0])

    def training_timestep(self, config: Mapping[str, Any], told: Tensor) -> Tensor:
        """The inverse."""
        return (1 - told) * 1000

    def inputs(
        self, config: Mapping[str, Any], x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As given.

        Raises:
            ValueError: For captions of unequal lengths: the image would stand at another place in each row.
        """
        mask = condition.get("encoder_attention_mask")
        if mask is not None:
            lengths = mask.sum(1)
            if not bool((lengths == lengths[0]).all()):
                raise ValueError(
                    f"The captions have {sorted(set(lengths.tolist()))} tokens: the image would stand at another place "
                    "in each row of the sequence. Give a batch captions of one length, or one at a time."
                )
        return super().inputs(config, x_t, level, condition)

    def output(self, config: Mapping[str, Any], raw: Any, x_t: Tensor) -> Tensor:
        """The negative of what the network gives, as the pipeline takes it."""
        return -super().output(config, raw, x_t)

    def with_output(self, config: Mapping[str, Any], raw: Tensor, prediction: Tensor) -> Tensor:
        """The negative again."""
        return super().with_output(config, raw, -prediction)

    def lanes(self, pipe: Any, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call; classifier-free guidance is a second call."""
        return BatchLanes(slice(0, inputs["hidden_states"].shape[0]))

    def grid(
        self, config: Mapping[str, Any], tokens: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], int] | None:
        """Longer sequences are caption first, then image."""
        patch = self.multiple(config)
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), tokens - h * w) if tokens >= h * w else None

    def example(self, config: Mapping[str, Any], batch: int, device: str) -> dict[str, Any]:
        """256 caption tokens."""
        mask = torch.ones(batch, 256, dtype=torch.long, device=device)
        return {
            "encoder_hidden_states": torch.zeros(batch, 256, config["cap_feat_dim"], device=device),
            "encoder_attention_mask": mask.as_subclass(_FullMask) if mask.is_meta else mask,
        }
