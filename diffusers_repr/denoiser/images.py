"""Images in, pixels out: PIL, numpy and tensors to one float32 tensor in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_pixels(images: Any, channels: int = 3, image_size: int | tuple[int, int] | None = None) -> Tensor:
    """Bring images to `(B, channels, H, W)` float32 in [-1, 1].

    Args:
        images: One image or a sequence of them: PIL; numpy `(H, W)`, `(H, W, C)` or `(B, H, W, C)`; tensor `(C, H, W)`
            or `(B, C, H, W)`. uint8 runs over 0..255, floats over [0, 1].
        channels: 1 converts PIL images to grey, 3 to RGB. 16-bit grey ones run over 0..65535.
        image_size: Resize to `(H, W)` (an int: square; the aspect ratio is not kept) by a bicubic filter. None
            keeps the size.

    Raises:
        ValueError: Empty list, mixed sizes, values out of range or not finite, wrong number of channels.
        TypeError: Anything that is no image.
    """
    items = _items(images)
    if not items:
        raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = [_one(item, channels, size, at) for at, item in enumerate(items)]
    shapes = sorted({tuple(p.shape[1:]) for p in pixels})
    if len(shapes) > 1:
        raise ValueError(
            f"Images of mixed sizes (H, W) {shapes}: pass `image_size=(H, W)` to resize them, or one size at a time."
        )
    return torch.stack(pixels)


def _items(images: Any) -> list[Any]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [part for image in images for part in _items(image)]
    if hasattr(images, "__iter__") and not isinstance(images, (str, bytes, dict)):
        return [part for image in images for part in _items(image)]
    hint = ""
    if isinstance(images, (str, Path)):
        hint = " Open files first: PIL.Image.open(path)."
    elif isinstance(images, dict):
        hint = " Of a data set, pass its column of images."
    raise TypeError(
        f"Cannot read images from {type(images).__name__}; pass PIL images, numpy arrays (H, W, C) or "
        f"tensors (C, H, W).{hint}"
    )


def _one(image: Any, channels: int, size: tuple[int, int] | None, at: int) -> Tensor:
    if isinstance(image, Image.Image) and image.mode.startswith("I;16"):  # PIL's conversion would clip it at 255
        image = np.asarray(image).astype(np.float32) / 65535
    if isinstance(image, Image.Image):
        image = _pil(image, channels, at)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        array = torch.from_numpy(np.array(image))
        pixels = array[None] if array.ndim == 2 else array.permute(2, 0, 1)
    elif isinstance(image, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(image))
        pixels = array[None] if array.ndim == 2 else array.permute(2, 0, 1) if array.ndim == 3 else array
    else:
        pixels = image
    if pixels.ndim != 3:
        raise ValueError(
            f"Image {at} has shape {tuple(pixels.shape)}; expected 3 dimensions (2 for grey numpy arrays)."
        )
    if pixels.shape[0] == 1 and channels == 3:
        pixels = pixels.expand(3, -1, -1)
    if pixels.shape[0] != channels:
        raise ValueError(
            f"Image {at} has {pixels.shape[0]} channels in shape {tuple(pixels.shape)} (C, H, W); the model takes "
            f"{channels}. Numpy arrays are (H, W, C), tensors (C, H, W)."
        )
    pixels = _unit_range(pixels, at)
    if size is not None and tuple(pixels.shape[1:]) != tuple(size):
        pixels = torch.nn.functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(
            0, 1
        )
    return 2 * pixels - 1


def _pil(image: Image.Image, channels: int, at: int) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"Image {at} is a PIL image of mode {image.mode!r}, whose range is not known; pass it as a float array in "
            "[0, 1], or in mode 'L', 'RGB' or 'I;16'."
        )
    if channels not in _MODES:
        raise ValueError(f"PIL images cannot give {channels} channels; pass tensors (C, H, W).")
    return image.convert(_MODES[channels])


def _unit_range(pixels: Tensor, at: int) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise TypeError(f"Image {at} has dtype {pixels.dtype}; expected uint8 (0..255) or floats in [0, 1].")
    pixels = pixels.float()
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError(f"Image {at} has NaN or infinite values; check how it was made.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(
            f"Image {at} has values in [{low:.4g}, {high:.4g}]; floats must lie in [0, 1]. "
            "From [-1, 1] use (x + 1) / 2, from 0..255 use uint8."
        )
    return pixels
