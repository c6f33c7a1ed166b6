"""A confusion matrix as a picture: rows are what images are, columns what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _RIGHT, _WRONG = (34, 34, 34), (255, 255, 255), np.array([0, 114, 178]), np.array([213, 94, 0])
_EDGE, _TEXT, _LEAST = 8, 12, 8  # pixels
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def confusion_picture(counts: np.ndarray, names: Sequence[str], most: int = 40) -> Image.Image:
    """Counts in cells as dark as their share of the row: blue where right, orange where wrong.

    Args:
        counts: `(K, K)` whole numbers, truth by prediction.
        names: Of the classes.
        most: Classes shown at most: those with the most mistakes.

    Raises:
        ValueError: For another shape than that of the names.
    """
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} classes have a matrix of as many rows and columns; got {counts.shape}.")
    kept = np.arange(len(names))
    if len(names) > most:
        missed = counts.sum(1) - counts.diagonal()
        kept = np.sort(np.argsort(-missed, kind="stable")[:most])
    shown, words = counts[np.ix_(kept, kept)], [_short(names[int(at)]) for at in kept]
    font = ImageFont.load_default(_TEXT)
    side = max(30, *(int(font.getlength(str(value))) + _LEAST for value in (shown.max(initial=0),)))
    label = max(int(font.getlength(word)) for word in words)
    left, top = _EDGE + label + _LEAST + 18, _EDGE + 40
    upright = label > side - 4  # names of columns do not fit side by side
    top += label if upright else 0
    size = left + side * len(kept) + _EDGE, top + side * len(kept) + _EDGE
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    share = shown / np.maximum(counts.sum(1)[kept, None], 1)
    for row in range(len(kept)):
        for column in range(len(kept)):
            colour = _RIGHT if row == column else _WRONG
            strength = float(share[row, column]) ** 0.5
            fill = tuple(int(v) for v in (255 + (colour - 255) * strength).round())
            corner = left + side * column, top + side * row
            draw.rectangle((*corner, corner[0] + side - 2, corner[1] + side - 2), fill)
            if shown[row, column]:
                ink = _PAPER if strength > 0.7 else _INK
                draw.text((corner[0] + side // 2, corner[1] + side // 2), str(shown[row, column]), ink, font, "mm")
        draw.text((left - _LEAST, top + side * row + side // 2), words[row], _INK, font, "rm")
        centre = left + side * row + side // 2
        if upright:
            _upright(sheet, words[row], (centre, top - _LEAST), font)
        else:
            draw.text((centre, top - _LEAST), words[row], _INK, font, "md")
    draw.text((left, _EDGE), "predicted (columns), true (rows)", _INK, font)
    return sheet


def _upright(
    sheet: Image.Image, word: str, foot: tuple[int, int], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    width = int(font.getlength(word)) + 2
    strip = Image.new("RGB", (width, _TEXT + 4), _PAPER)
    ImageDraw.Draw(strip).text((0, 0), word, _INK, font)
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (foot[0] - turned.width // 2, foot[1] - turned.height))


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


__all__ = ["confusion_picture"]
