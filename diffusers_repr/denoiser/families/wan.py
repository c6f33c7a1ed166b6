"""`WanTransformer3DModel`: Wan 2.1 and 2.2, text to video (arXiv 2503.20314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.families.video import VideoFamily
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel


@register_family("WanTransformer3DModel")
class WanFamily(VideoFamily):
    """Self-attention over all frames, then the text, block by block; one call a condition."""

    not_image = (*VideoFamily.not_image, "condition_embedder")
    stacks = ("blocks",)

    def channels(self) -> int:
        """Those it predicts: an image-to-video network takes more."""
        return int(self.config["out_channels"] or self.config["in_channels"])

    def size(self) -> tuple[int, int]:
        """480 x 832 pixels: the config has no size, the pipeline takes 60 x 104 latent pixels."""
        return 60, 104

    def patch(self) -> tuple[int, int, int]:
        """As configured."""
        frames, height, width = self.config["patch_size"]
        return int(frames), int(height), int(width)

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Latents `(B, C, f, h, w)`.

        Raises:
            ValueError: For a network that takes a first frame among its channels.
        """
        if int(self.config["in_channels"]) != self.channels():
            raise ValueError(
                f"This network takes {self.config['in_channels']} channels, {self.channels()} of them the video's: it "
                "goes on from a given image. Networks of text to video are read."
            )
        return super().inputs(x_t, level, condition)

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call, the text's first; classifier-free guidance is a second call."""
        return BatchLanes(slice(0, inputs[self.sample_name].shape[0]))

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 text tokens."""
        return {"encoder_hidden_states": torch.zeros(batch, 512, self.config["text_dim"], device=device)}
