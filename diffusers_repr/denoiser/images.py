"""Images in, pixels out: PIL, numpy and tensors to one float32 tensor in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_CLEAR = ("RGBA", "LA", "PA", "La", "RGBa")  # modes with transparency
_KNOWN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *_CLEAR)


def to_pixels(
    images: Any,
    channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Bring images to `(B, channels, H, W)` float32 in [-1, 1].

    Args:
        images: One image or a sequence of them: PIL; numpy `(H, W)`, `(H, W, C)` or `(B, H, W, C)`; tensor `(C, H, W)`
            or `(B, C, H, W)`. uint8 runs over 0..255, floats over [0, 1].
        channels: 1 converts PIL images to grey, 3 to RGB, as `as_mode` does; 4 keeps transparency. 16-bit grey ones
            run over 0..65535.
        image_size: Resize to `(H, W)` (an int: square; the aspect ratio is not kept) by a bicubic filter. None
            keeps the size.
        numbers: Of each image, for messages; counted from 0 if None.

    Raises:
        ValueError: Empty list, mixed sizes, values out of range or not finite, wrong number of channels, a PIL image
            that cannot be read or whose mode has no known range.
        TypeError: Anything that is no image.
    """
    items = image_items(images)
    if not items:
        raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    numbers = range(len(items)) if numbers is None or len(numbers) != len(items) else numbers
    pixels = [_one(item, channels, size, at) for at, item in zip(numbers, items, strict=True)]
    shapes = sorted({tuple(p.shape[1:]) for p in pixels})
    if len(shapes) > 1:
        raise ValueError(
            f"Images of mixed sizes (H, W) {shapes}: pass `image_size=(H, W)` to resize them, or one size at a time."
        )
    return torch.stack(pixels)


def image_items(images: Any) -> list[Any]:
    """Single images out of all forms in which `to_pixels` takes them.

    Raises:
        TypeError: For anything that is no image.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [part for image in images for part in image_items(image)]
    if hasattr(images, "__iter__") and not isinstance(images, (str, bytes, dict)):
        return [part for image in images for part in image_items(image)]
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
    if isinstance(image, Image.Image):
        image = _pil(image, channels, at)
    if isinstance(image, Image.Image):
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        array = torch.from_numpy(np.array(image))
        pixels = array[None] if array.ndim == 2 else array.permute(2, 0, 1)
    elif isinstance(image, np.ndarray):
        array = torch.from_numpy(np.require(image, requirements=["C", "W"]))  # copied if read-only: torch warns of it
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


def check_mode(image: Image.Image) -> None:
    """Refuse a PIL image whose values have no known range or meaning.

    Raises:
        ValueError: For modes such as `I`, `F` and `LAB`.
    """
    if image.mode not in _KNOWN and not image.mode.startswith("I;16"):
        raise ValueError(
            f"an image of mode {image.mode!r} has no known range; store it with 8 bits as 'L' or 'RGB', or with 16 "
            "bits as 'I;16', or pass it as a float array in [0, 1]"
        )


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image of any mode as `L` (1 channel) or `RGB` (3).

    16-bit grey runs over 0..65535 and is brought to 8 bit; what is transparent shows white; CMYK and the other colour
    spaces are converted by PIL's formulas, without colour profiles.

    Raises:
        ValueError: For modes whose range is not known (`I`, `F`), or another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"Images have 1 channel (grey) or 3 (RGB); the model takes {channels}.")
    check_mode(image)
    if image.mode.startswith("I;16"):  # PIL's conversion would clip it at 255
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    if image.mode in _CLEAR or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    return image.convert("L" if channels == 1 else "RGB")


def _pil(image: Image.Image, channels: int, at: int) -> Image.Image | np.ndarray:
    """8-bit `L`, `RGB` or `RGBA`; of 16-bit grey all the digits, as an array in [0, 1]."""
    if channels not in (1, 3, 4):
        raise ValueError(f"PIL images cannot give {channels} channels; pass tensors (C, H, W).")
    try:
        check_mode(image)
        if image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.float32) / 65535
        return image.convert("RGBA") if channels == 4 else as_mode(image, channels)
    except (ValueError, OSError, SyntaxError) as error:  # a file that was opened is read only now
        raise ValueError(f"Image {at} cannot be used: {error}.") from error


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
