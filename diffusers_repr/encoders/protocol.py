"""What an encoder is to those who use one; `Encoder` is all of it, a class of one's own need not inherit from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusers_repr.encoders.output import EncoderOutput


@runtime_checkable
class EncoderInfo(Protocol):
    """An encoder whose features may all lie in a cache: it is known, and need not be loaded."""

    @property
    def name(self) -> str:
        """What it is called in caches and logs."""

    @property
    def dim(self) -> int:
        """Channels of its features, D."""

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of images of `size` (H, W)."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the features, as JSON values: equal for encoders whose features are the same."""


@runtime_checkable
class ImageEncoder(EncoderInfo, Protocol):
    """An encoder that can be run."""

    @property
    def channels(self) -> int:
        """Channels of the images it takes."""

    @property
    def device(self) -> torch.device:
        """Where its network lies."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """Move the network."""

    def encode_pixels(self, pixels: Tensor, batch_size: int | None = None) -> EncoderOutput:
        """Features of `(B, C, H, W)` in [-1, 1], float32, without a graph; preprocessing is the encoder's."""


@runtime_checkable
class AttentionEncoder(ImageEncoder, Protocol):
    """An encoder that also tells the attention among its patch tokens."""

    @property
    def num_blocks(self) -> int | None:
        """Blocks whose attention it can give; None where that is not known."""

    def encode_with_attention(self, pixels: Tensor, layers: Sequence[int]) -> tuple[EncoderOutput, list[Tensor]]:
        """Features, and of each block `(B, heads, N, N)`, rows adding up to 1."""


__all__ = ["AttentionEncoder", "EncoderInfo", "ImageEncoder"]
