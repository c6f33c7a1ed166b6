"""Images of any size brought to the network's, the middle kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import to_pixels

RESIZES = ("crop", "stretch")


def check_resize(resize: str) -> str:
    """The word, if it is one; ValueError with those there are else."""
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r}; take one of {', '.join(RESIZES)}.")
    return resize


def sized_pixels(images: Sequence[Any], denoiser: Denoiser, size: tuple[int, int], resize: str) -> Tensor:
    """Images as `(N, C, H, W)` float32 in [-1, 1].

    Args:
        images: PIL images, arrays or tensors, each of any size.
        denoiser: Whose channels they get.
        size: (H, W).
        resize: `crop`: brought to the least size that covers `size`, bicubic and antialiased, and the middle taken, as
            the paper's code does; `stretch`: each side by itself.

    Raises:
        ValueError: For another word.
    """
    if check_resize(resize) == "stretch":
        return torch.cat([to_pixels(image, denoiser.image_channels, size) for image in images])
    return torch.cat([_cropped(to_pixels(image, denoiser.image_channels), size) for image in images])


def _cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = pixels.shape[2:]
    factor = max(size[0] / height, size[1] / width)
    covering = (max(round(height * factor), size[0]), max(round(width * factor), size[1]))
    if covering != (height, width):
        pixels = functional.interpolate(pixels, covering, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((have - want) // 2 for have, want in zip(covering, size, strict=True))
    return pixels[:, :, top : top + size[0], left : left + size[1]].clamp(-1, 1)


__all__ = ["RESIZES", "check_resize", "sized_pixels"]
