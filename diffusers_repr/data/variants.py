"""Variants of images, as `diffusers-repr generate` writes them, beside the images that they were made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.base import hashed, spread_rows
from diffusers_repr.store.image_store import ImageStore


def read_variants(folder: str | Path, images: Tensor) -> Tensor:
    """The variants of each image.

    Args:
        folder: An `ImageStore` of as many variants of every image, made at the size of the images.
        images: uint8 `(N, C, H, W)`, in the order of the data that the variants were made of, and at the size they are
            stored in.

    Returns:
        uint8 `(N, V, C, H, W)`.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: For variants of other images, of another size, or not of all.
    """
    store = ImageStore.open(folder)
    keys, (count, channels, height, width) = store.image_keys(), tuple(images.shape)
    if len(keys) % count or not len(keys):
        raise ValueError(f"{str(folder)!r} has {len(keys)} images, not as many variants of each of {count} images.")
    each = len(keys) // count
    sources = [str(key.source) for key in keys]
    if any(f"/{at // each}#" not in source for at, source in enumerate(sources)):
        raise ValueError(f"{str(folder)!r} does not hold the variants of each image in the order of the data.")
    if (keys[0].height, keys[0].width) != (height, width):
        raise ValueError(
            f"The variants in {str(folder)!r} are {keys[0].height} x {keys[0].width} (H x W), the images {height} x "
            f"{width}; make them by a model of that size, or train at theirs."
        )
    for row in spread_rows(count):
        known, told = image_key(images[row].permute(1, 2, 0)), sources[row * each].rpartition("#")[2]
        if known != told:
            raise ValueError(
                f"The variants in {str(folder)!r} are not of these images: image {row} was another ({told}, here "
                f"{known}). Make them anew from this data set and split."
            )
    mode = "L" if channels == 1 else "RGB"
    found = np.stack([np.array(picture.convert(mode)) for picture in store.pictures()])
    pixels = torch.from_numpy(found).view(count, each, height, width, channels)
    return pixels.permute(0, 1, 4, 2, 3).contiguous()


def image_key(pixels: Tensor | np.ndarray) -> str:
    """Short hash of an image `(H, W, C)` or `(H, W)`, uint8."""
    return hashed([np.ascontiguousarray(pixels).tobytes()])[:16]


__all__ = ["image_key", "read_variants"]
