"""Masks and uncertainty over images; needs nothing but Pillow and numpy."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.61803398875  # turns of hue by it are far from all before
_FIRST = ((60, 60, 60), (230, 75, 53), (0, 160, 135), (60, 84, 200), (243, 190, 50), (145, 80, 170), (126, 200, 80))
# Ink to paper: what is certain is dark.
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def palette(classes: int) -> np.ndarray:
    """`(classes, 3)` uint8 colours, one a class; the first is grey, as of a background.

    Example:
        >>> palette(2).tolist()
        [[60, 60, 60], [230, 75, 53]]
    """
    more = [colorsys.hsv_to_rgb(at * _GOLDEN % 1, 0.65, 0.9) for at in range(max(0, classes - len(_FIRST)))]
    colours = [*_FIRST, *(tuple(round(255 * value) for value in colour) for colour in more)]
    return np.array(colours[:classes], np.uint8)


def mask_over(
    image: Image.Image, mask: np.ndarray, classes: int, strength: float = 0.6, edges: bool = True
) -> Image.Image:
    """An image with the classes of its pixels as colours, and lines where classes meet.

    Args:
        image: Of any size; the mask's is taken.
        mask: `(H, W)` class ids; ids from `classes` on, and those below 0, are left as the image is.
        classes: How many colours there are.
        strength: Of the colours, 0 to 1.
        edges: Whether to draw the lines.
    """
    under = np.asarray(image.convert("RGB").resize(mask.shape[::-1], Image.Resampling.BICUBIC), np.float32)
    known = (mask >= 0) & (mask < classes)
    colours = palette(classes)[np.where(known, mask, 0)].astype(np.float32)
    share = np.where(known, strength, 0.0)[..., None]
    drawn = (1 - share) * under + share * colours
    if edges:
        line = np.zeros(mask.shape, bool)
        line[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        line[1:] |= mask[1:] != mask[:-1]
        drawn[line] = 255
    return Image.fromarray(drawn.round().astype(np.uint8))


def mask_image(mask: np.ndarray, classes: int) -> Image.Image:
    """Class ids as an image whose values are the ids, shown in the colours of `palette`; 16 bits from 257 classes on.

    Args:
        mask: `(H, W)` class ids.
        classes: How many there are.
    """
    if classes > 256:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(palette(256).flatten().tolist())
    return image


def heat(values: np.ndarray, highest: float | None = None) -> Image.Image:
    """Numbers from 0 on as colours, dark to bright.

    Args:
        values: `(H, W)`.
        highest: What is brightest; the largest of the values if None.
    """
    top = float(values.max()) if highest is None else highest
    place = np.clip(values / max(top, 1e-12), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    share = (place - low)[..., None]
    colours = np.array(_HEAT, np.float64)
    return Image.fromarray(((1 - share) * colours[low] + share * colours[low + 1]).round().astype(np.uint8))


def legend(names: Sequence[str], height: int = 18, side: int = 12) -> Image.Image:
    """The colours of `palette` with what they stand for, in one row."""
    font: Any = ImageFont.load_default(13)
    widths = [round(font.getlength(name)) + side + 16 for name in names]
    strip = Image.new("RGB", (sum(widths) + 4, height), (255, 255, 255))
    draw, left = ImageDraw.Draw(strip), 4
    for name, width, colour in zip(names, widths, palette(len(names)).tolist(), strict=True):
        top = (height - side) // 2
        draw.rectangle((left, top, left + side, top + side), tuple(colour))
        draw.text((left + side + 5, height // 2), name, (34, 34, 34), font, anchor="lm")
        left += width
    return strip


__all__ = ["heat", "legend", "mask_image", "mask_over", "palette"]
