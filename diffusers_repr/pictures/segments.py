"""Segments over an image with their names; needs nothing but Pillow and numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusers_repr.pictures.masks import mask_over, palette

_INK, _PAPER = (34, 34, 34), (255, 255, 255)
_TEXT, _BOX, _LINE, _GAP = 13, 12, 19, 14


def segment_picture(
    image: Image.Image, ids: np.ndarray, names: Mapping[int, str], side: int = 320, strength: float = 0.55
) -> Image.Image:
    """An image with a colour over each segment, and below it which colour has which name.

    Under a colour the image is grey, so that the colour is that of its name; a wide segment has its name inside, too.

    Args:
        image: Of any size; that of `ids` is taken.
        ids: `(H, W)` whole numbers: the id of a segment, from 1 on; 0 is left as the image is.
        names: Of the segments, by id.
        side: Pixels of the longer side, at least; smaller images are drawn larger by a whole factor.
        strength: Of the colours, 0 to 1.

    Example:
        >>> segment_picture(Image.new("RGB", (8, 4)), np.eye(4, 8, dtype=int), {1: "cat"}).size
        (320, 183)
    """
    factor = max(1, math.ceil(side / max(ids.shape)))
    large = ids.repeat(factor, 0).repeat(factor, 1)
    order = {number: place for place, number in enumerate(names, start=1)}  # the palette's first is for the ground
    colours = np.full(large.shape, -1)
    for number, place in order.items():
        colours[large == number] = place
    shown = image.convert("RGB")
    if factor > 1:
        shown = shown.resize(large.shape[::-1], Image.Resampling.NEAREST)
    covered = Image.fromarray(np.where(colours > 0, 255, 0).astype(np.uint8))
    shown = Image.composite(shown.convert("L").convert("RGB"), shown, covered)  # so that hues are those of the names
    drawn = mask_over(shown, colours, len(names) + 1, strength)
    _write_inside(drawn, large, names)
    below = _names(list(names.values()), drawn.width)
    whole = Image.new("RGB", (drawn.width, drawn.height + below.height), _PAPER)
    whole.paste(drawn)
    whole.paste(below, (0, drawn.height))
    return whole


def _write_inside(drawn: Image.Image, ids: np.ndarray, names: Mapping[int, str]) -> None:
    """Names in the middle of the segments that are wide enough for them."""
    font: Any = ImageFont.load_default(_TEXT)
    draw = ImageDraw.Draw(drawn)
    for number, name in names.items():
        rows, columns = np.nonzero(ids == number)
        if not len(rows):
            continue
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)  # a pixel of its own
        y, x = int(rows[middle]), int(columns[middle])
        half = round(font.getlength(name) / 2) + 2
        around = ids[max(y - _TEXT // 2, 0) : y + _TEXT // 2 + 1, max(x - half, 0) : x + half]
        if around.shape[1] == 2 * half and bool((around == number).all()):
            draw.text((x, y), name, _PAPER, font, anchor="mm", stroke_width=2, stroke_fill=_INK)


def _names(names: list[str], width: int) -> Image.Image:
    """The colours with their names, in as many rows as they need."""
    font: Any = ImageFont.load_default(_TEXT)
    placed, left, row = [], 4, 0
    for name in names:
        needed = _BOX + 5 + round(font.getlength(name))
        if left > 4 and left + needed > width:
            left, row = 4, row + 1
        placed.append((left, row * _LINE + 4))
        left += needed + _GAP
    strip = Image.new("RGB", (width, (row + 1) * _LINE + 4 if names else 0), _PAPER)
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(placed, names, palette(len(names) + 1).tolist()[1:], strict=True):
        draw.rectangle((x, y, x + _BOX, y + _BOX), tuple(colour))
        draw.text((x + _BOX + 5, y + _BOX // 2), name, _INK, font, anchor="lm")
    return strip


__all__ = ["segment_picture"]
