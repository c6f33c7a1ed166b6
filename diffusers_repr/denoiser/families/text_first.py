"""What transformers share that hold text and image in one sequence, the text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.denoiser.family import BatchLanes, Grid, PatchTransformerFamily


class TextFirstFamily(PatchTransformerFamily):
    """Longer sequences are text first, then image. The pipeline calls the network once a condition."""

    conditioning = "text"

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """One condition a call; classifier-free guidance is a second call."""
        return BatchLanes(slice(0, inputs[self.sample_name].shape[0]))

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """The last tokens are the image's."""
        patch = self.multiple()
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), tokens - h * w) if tokens >= h * w else None
