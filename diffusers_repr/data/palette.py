"""`Palette`: a colour for each class of pixels, and back; a colour that is none of them is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


class Palette:
    """Colours of classes, exact both ways: nothing is rounded to the nearest.

    Args:
        colours: `(red, green, blue)` of each class, 0 to 255.
        ignored: Of pixels of no class; no class may have it.
        ignore_index: Their id.

    Raises:
        ValueError: For colours out of range, a colour that stands for two, and no colours.

    Example:
        >>> palette = Palette([(0, 0, 0), (255, 0, 0)])
        >>> palette.ids(palette.image(np.array([[0, 1, 255]]))).tolist()
        [[0, 1, 255]]
    """

    def __init__(
        self,
        colours: Sequence[Sequence[int]],
        ignored: Sequence[int] = (128, 128, 128),
        ignore_index: int = 255,
    ) -> None:
        known = [tuple(int(value) for value in colour) for colour in (*colours, ignored)]
        if not colours:
            raise ValueError("A palette has a colour for each class; got none.")
        wrong = next((one for one in known if len(one) != 3 or not all(0 <= value <= 255 for value in one)), None)
        if wrong is not None:
            raise ValueError(f"A colour is red, green and blue from 0 to 255; got {wrong}.")
        double = next((one for place, one in enumerate(known) if one in known[:place]), None)
        if double is not None:
            raise ValueError(f"The colour {double} stands for two classes, or for one and for pixels of no class.")
        if 0 <= ignore_index < len(colours):
            raise ValueError(f"ignore_index={ignore_index} is one of the {len(colours)} classes.")
        self.colours, self.ignored, self.ignore_index = known[:-1], known[-1], ignore_index

    @classmethod
    def of(cls, colours: Sequence[str], ignore_index: int = 255) -> Palette:
        """A palette from texts.

        Args:
            colours: `#rrggbb` of each class, and a last one of pixels of no class.
            ignore_index: Id of these.

        Raises:
            ValueError: For what is no colour, and as the class.

        Example:
            >>> Palette.of(["#000000", "#ff8000", "#808080"]).colours
            [(0, 0, 0), (255, 128, 0)]
        """
        wrong = next((one for one in colours if not re.fullmatch("#[0-9a-fA-F]{6}", one)), None)
        if wrong is not None:
            raise ValueError(f"A colour is #rrggbb, got {wrong!r}.")
        known = [tuple(int(one[at : at + 2], 16) for at in (1, 3, 5)) for one in colours]
        return cls(known[:-1], known[-1] if known else (128, 128, 128), ignore_index)

    def image(self, ids: np.ndarray) -> np.ndarray:
        """`(H, W, 3)` uint8 colours of class ids `(H, W)`.

        Raises:
            ValueError: For an id that is no class.
        """
        given = np.asarray(ids)
        wrong = given[((given < 0) | (given >= len(self.colours))) & (given != self.ignore_index)]
        if wrong.size:
            raise ValueError(
                f"The class {wrong.flat[0]} has no colour; there are those of 0 to {len(self.colours) - 1}, and of "
                f"{self.ignore_index} for none."
            )
        table = np.array([*self.colours, self.ignored], np.uint8)
        return table[np.where(given == self.ignore_index, len(self.colours), given)]

    def ids(self, image: Any) -> np.ndarray:
        """`(H, W)` int64 class ids of a PIL image or an array `(H, W, 3)` in these colours.

        Raises:
            ValueError: For a colour outside of the palette; names the colour and its place.
        """
        colours = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if colours.ndim != 3 or colours.shape[2] != 3:
            raise ValueError(f"An image of colours is (H, W, 3); got {colours.shape}.")
        found = np.full(colours.shape[:2], -1, np.int64)
        for number, colour in enumerate(self.colours):
            found[(colours == colour).all(2)] = number
        ignored = (colours == self.ignored).all(2)
        found[ignored] = self.ignore_index
        stray = (found == -1) & ~ignored
        if stray.any():
            y, x = np.argwhere(stray)[0]
            raise ValueError(
                f"The colour {tuple(map(int, colours[y, x]))} at x={x}, y={y} is none of the palette's "
                f"{len(self.colours)} classes, nor {self.ignored} for none. Was the image resized other than by the "
                "nearest pixel, or stored as JPEG?"
            )
        return found


__all__ = ["Palette"]
