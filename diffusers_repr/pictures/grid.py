"""Grids of samples with gaps, a title, and names of rows and columns; needs nothing but Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK, _PAPER = (34, 34, 34), (255, 255, 255)
_TEXT, _GAP, _EDGE = 13, 4, 6  # pixels


def image_grid(
    images: Sequence[Image.Image] | Tensor,
    columns: int = 8,
    *,
    title: str | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    side: int = 64,
) -> Image.Image:
    """Images side by side, row after row, on white.

    Args:
        images: PIL images, or a tensor `(N, 1 or 3, H, W)` in [0, 1]; the last row may be short.
        columns: Images in a row.
        title: Above all.
        row_titles: In front of each row.
        column_titles: Above each column.
        side: Smaller images are enlarged by whole factors, pixel by pixel, as far as their width stays below it.

    Raises:
        ValueError: For no images, and titles that are not as many as rows or columns.

    Example:
        >>> image_grid(torch.rand(6, 1, 8, 8), columns=3, row_titles=["a", "b"]).mode
        'RGB'
    """
    tiles = _enlarged(_pil(images) if isinstance(images, Tensor) else list(images), side)
    if not tiles or columns < 1:
        raise ValueError(f"A grid needs images and columns; got {len(tiles)} images and columns={columns}.")
    columns = min(columns, len(tiles)) if column_titles is None else columns
    rows = -(-len(tiles) // columns)
    for name, titles, count in (("row_titles", row_titles, rows), ("column_titles", column_titles, columns)):
        if titles is not None and len(titles) != count:
            raise ValueError(f"{len(titles)} {name} for {count}: {len(tiles)} images in {columns} columns.")
    font = ImageFont.load_default(_TEXT)
    width, height = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    lines, names = _size_of(column_titles, font), _size_of(row_titles, font)
    width = max(width, lines[0])
    head = _size_of([title] if title else None, font)
    left = _EDGE + (names[0] + _EDGE if row_titles else 0)
    top = _EDGE + (head[1] + _EDGE if title else 0) + (lines[1] + _GAP if column_titles else 0)
    size = left + columns * (width + _GAP) - _GAP + _EDGE, top + rows * (height + _GAP) - _GAP + _EDGE
    sheet = Image.new("RGB", (max(size[0], head[0] + 2 * _EDGE), size[1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.multiline_text((_EDGE, _EDGE), title, _INK, font)
    for place, text in enumerate(column_titles or ()):
        at = left + place * (width + _GAP) + width // 2
        draw.multiline_text((at, top - _GAP), text, _INK, font, anchor="md", align="center")
    for place, text in enumerate(row_titles or ()):
        at = top + place * (height + _GAP) + height // 2
        draw.multiline_text((left - _EDGE, at), text, _INK, font, anchor="rm", align="right")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        over = (width - tile.width) // 2, (height - tile.height) // 2
        sheet.paste(tile, (left + column * (width + _GAP) + over[0], top + row * (height + _GAP) + over[1]))
    return sheet


def _pil(images: Tensor) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"A grid takes a tensor (N, 1 or 3, H, W) in [0, 1]; got {tuple(images.shape)}.")
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]


def _enlarged(images: Sequence[Image.Image], side: int) -> list[Image.Image]:
    """All by one factor, so that sizes stay comparable."""
    factor = max(1, side // max((image.width for image in images), default=side))
    return [
        image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        for image in images
    ]


def _size_of(texts: Sequence[str] | None, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Width and height of the largest text."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), text, font=font) for text in texts or ()]
    return max((round(box[2]) for box in boxes), default=0), max((round(box[3]) for box in boxes), default=0)


__all__ = ["image_grid"]
