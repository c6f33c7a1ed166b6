"""Matches between two images as a picture: lines from point to point, and heat maps of likeness. Pillow alone."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK = (255, 255, 255), (34, 34, 34)
_RIGHT, _WRONG = (40, 200, 80), (235, 50, 50)
_GAP, _TEXT = 8, 14  # pixels
# From cold to hot, equally spaced; dark where nothing is alike, so that it reads in grey too.
_HEAT = np.array([(0, 0, 20), (60, 15, 110), (160, 40, 100), (235, 100, 45), (250, 200, 50), (255, 255, 210)], float)


def draw_match_lines(
    source: Image.Image,
    target: Image.Image,
    points: np.ndarray,
    matches: np.ndarray,
    *,
    correct: Sequence[bool] | None = None,
    height: int = 360,
    title: str | None = None,
) -> Image.Image:
    """Two images side by side, with a line from each point to its match.

    Args:
        source: Left.
        target: Right.
        points: `(N, 2)` as (x, y) in pixels of the source.
        matches: `(N, 2)` in pixels of the target.
        correct: Of each match: green lines for right, red ones for wrong; each its own colour if None.
        height: Of both images in the picture.
        title: Above.

    Raises:
        ValueError: For unequal numbers of points, matches and `correct`.
    """
    if points.shape != matches.shape or points.ndim != 2 or (correct is not None and len(correct) != len(points)):
        count = "" if correct is None else f" and {len(correct)} truths"
        raise ValueError(f"Points and matches must both be (N, 2); got {points.shape}, {matches.shape}{count}.")
    left, right = _scaled(source, height), _scaled(target, height)
    font = ImageFont.load_default(_TEXT)
    top = _GAP + (_TEXT + _GAP if title else 0)
    sheet = Image.new("RGB", (left.width + right.width + 3 * _GAP, top + height + _GAP), _PAPER)
    starts = (_GAP, top), (left.width + 2 * _GAP, top)
    for image, start in zip((left, right), starts, strict=True):
        sheet.paste(image, start)
    if title:
        ImageDraw.Draw(sheet).text((_GAP, _GAP), title, _INK, font)
    here, there = (
        _on_sheet(where, image, small, start)
        for where, image, small, start in zip((points, matches), (source, target), (left, right), starts, strict=True)
    )
    draw = ImageDraw.Draw(sheet)
    shades = (
        match_colours(len(points)) if correct is None else [(40, 200, 80) if c else (235, 50, 50) for c in correct]
    )
    for (x, y), (u, v), shade in zip(here, there, shades, strict=True):
        draw.line((x, y, u, v), _PAPER, 4)
        draw.line((x, y, u, v), shade, 2)
    for at, shade in enumerate(shades):
        for x, y in (here[at], there[at]):
            _dot(draw, x, y, shade, str(at) if len(points) <= 30 else "")
    return sheet


def draw_similarity(
    target: Image.Image,
    similarity: np.ndarray,
    matches: np.ndarray,
    *,
    columns: int = 4,
    height: int = 220,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """The target once a point, with the likeness of every pixel to that point as heat over it.

    Args:
        target: The image.
        similarity: `(N, H, W)`; each is shown from its median, dark, to its largest value, light.
        matches: `(N, 2)` as (x, y), marked.
        columns: Images in a row.
        height: Of each.
        names: Above each; its number, median and largest value if None.

    Raises:
        ValueError: For no maps, or unequal numbers.
    """
    if not len(similarity) or len(similarity) != len(matches):
        raise ValueError(f"{len(similarity)} similarity maps for {len(matches)} matches; one each, at least one.")
    small = _scaled(target, height)
    shades = match_colours(len(matches))
    rows = -(-len(similarity) // columns)
    columns = min(columns, len(similarity))
    cell = small.width + _GAP, height + _TEXT + 2 * _GAP
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1]), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for at, values in enumerate(similarity):
        row, column = divmod(at, columns)
        x, y = _GAP + column * cell[0], row * cell[1] + _TEXT + 2 * _GAP
        low, high = float(np.median(values)), float(values.max())
        name = f"{at}: cosine {low:.2f} to {high:.2f}" if names is None else names[at]
        draw.text((x, y - _TEXT - _GAP // 2), name, _INK, font)
        sheet.paste(_blend(small, (values - low) / max(high - low, 1e-12)), (x, y))
        (place,) = _on_sheet(matches[at : at + 1], target, small, (x, y))
        _dot(draw, *place, shades[at], "")
    return sheet


def stack_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on white."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def match_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ as much as so many can: round the hues, by the golden section."""
    hues = [(0.02 + at * 0.618034) % 1 for at in range(count)]
    bright = [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.85, 0.95)) for hue in hues]
    return [(r, g, b) for r, g, b in bright]


def _scaled(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(image.width * height / image.height))
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _on_sheet(
    points: np.ndarray, image: Image.Image, small: Image.Image, start: tuple[int, int]
) -> list[tuple[float, float]]:
    """Places on the sheet of points in pixels of an image whose first pixel has its centre at (0, 0)."""
    scale = np.array([small.width / image.width, small.height / image.height])
    found = (np.asarray(points, float) + 0.5) * scale + np.array(start)
    return [(float(x), float(y)) for x, y in found]


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, shade: tuple[int, int, int], text: str) -> None:
    draw.ellipse((x - 5, y - 5, x + 5, y + 5), shade, _PAPER, 2)
    if text:
        font = ImageFont.load_default(_TEXT)
        draw.text((x + 7, y - _TEXT), text, _PAPER, font, stroke_width=2, stroke_fill=_INK)


def _blend(image: Image.Image, heat: np.ndarray) -> Image.Image:
    large = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    value = np.clip(np.asarray(large, float), 0, 1)
    place = value * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    colours = _HEAT[low] + (place - low)[..., None] * (_HEAT[low + 1] - _HEAT[low])
    grey = np.asarray(image.convert("L"), float)[..., None].repeat(3, -1)
    return Image.fromarray(np.clip(0.35 * grey + 0.65 * colours, 0, 255).astype(np.uint8))


__all__ = ["draw_match_lines", "draw_similarity", "match_colours", "stack_pictures"]
