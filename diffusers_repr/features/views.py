"""Crops and mirror images of cached features: drawn by an image's key, so that neither neighbours nor batch matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.features.noise_policy import keyed_generator


def crop_and_flip(pixels: Tensor, keys: Sequence[object], padding: int = 0, flip: bool = False) -> Tensor:
    """Each image moved by up to `padding` pixels either way, what enters being black, and half of them mirrored.

    The augmentation of DDAE's linear probe (arXiv 2303.09769): a random crop of the padded image, and a flip.

    Args:
        pixels: `(B, C, H, W)` in [-1, 1].
        keys: Of each image; equal keys get equal draws on every machine.
        padding: In pixels; 0 leaves the place.
        flip: Whether half of them are mirrored.

    Raises:
        ValueError: For a negative padding, or another number of keys.

    Example:
        >>> image = torch.arange(4.0).view(1, 1, 2, 2)
        >>> crop_and_flip(image, [3], flip=True).flatten().tolist() in ([0, 1, 2, 3], [1, 0, 3, 2])
        True
    """
    if padding < 0 or len(keys) != len(pixels):
        raise ValueError(f"padding={padding} and {len(keys)} keys for {len(pixels)} images; padding is 0 or more.")
    height, width = pixels.shape[2:]
    padded = functional.pad(pixels, [padding] * 4, value=-1.0)
    made = []
    for image, key in zip(padded, keys, strict=True):
        down, across, mirrored = torch.rand(3, generator=keyed_generator("view", key)).tolist()
        top, left = (int(place * (2 * padding + 1)) for place in (down, across))
        part = image[:, top : top + height, left : left + width]
        made.append(part.flip(-1) if flip and mirrored < 0.5 else part)
    return torch.stack(made)


__all__ = ["crop_and_flip"]
