"""Segmentation masks of a column: class ids of pixels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import datasets
import numpy as np

from diffusers_repr.data.columns import innermost
from diffusers_repr.data.image_files import UnreadableImage, place_of, read_decoded
from diffusers_repr.data.palette import Palette

IGNORE_INDEX = 255


class MaskColumn:
    """The class ids of pixels, with what they are called.

    Args:
        feature: Type of the column: `datasets.Image`, or arrays of whole numbers or truth values (0 and 1).
        names: Name of each class; those of a `ClassLabel` inside the arrays if None, else not known.
        ignore_index: Id of pixels that belong to no class; None: there are none.
        palette: Of images that show classes by colours.

    Attributes:
        names: Name of each class id, if known.
        ignore_index: As given.

    Raises:
        ValueError: If `ignore_index` is one of the named classes; for a palette of arrays, or of other classes.
    """

    def __init__(
        self,
        feature: Any,
        names: Sequence[str] | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        palette: Palette | None = None,
    ) -> None:
        own = getattr(innermost(feature)[0], "names", None)
        self.names = list(names or own or []) or None
        self.ignore_index = ignore_index
        self._is_image, self.palette = isinstance(feature, datasets.Image), palette
        if palette is not None and not self._is_image:
            raise ValueError("Colours of classes are of masks that are images; these are arrays of class ids.")
        if palette is not None and self.names and len(palette.colours) != len(self.names):
            raise ValueError(f"{len(self.names)} classes and {len(palette.colours)} colours of classes; one is one's.")
        if self.names and ignore_index is not None and 0 <= ignore_index < len(self.names):
            raise ValueError(
                f"ignore_index={ignore_index} is the class {self.names[ignore_index]!r} of {len(self.names)}; pass an "
                "id that no class has, such as -100."
            )

    def read(self, value: Any, what: str, size: tuple[int, int]) -> np.ndarray:
        """`(H, W)` int32 class ids of a row.

        Args:
            value: Path and bytes of an image, a PIL image, or an array.
            what: Names it in messages: `The mask of row 3`.
            size: (H, W) of its image.

        Raises:
            UnreadableImage: If there is none, or its file cannot be read.
            ValueError: If it has another size than its image, colours, or ids that are no classes.
        """
        if value is None:
            raise UnreadableImage(f"{what} is missing.")
        ids = _of_image(value, what, self.palette) if self._is_image else _of_array(value, what)
        what += place_of(value)
        if ids.shape != size:
            raise ValueError(f"{what} is {ids.shape} (H, W), its image {size}; a mask has the size of its image.")
        last = np.iinfo(np.int32).max if self.names is None else len(self.names) - 1
        wrong = (ids < 0) | (ids > last)
        if self.ignore_index is not None:
            wrong &= ids != self.ignore_index
        if wrong.any():
            y, x = np.argwhere(wrong)[0]
            allowed = "from 0 on" if self.names is None else f"0 to {last}"
            hint = black_and_white(np.unique(ids).tolist(), False, self.ignore_index)
            raise ValueError(
                f"{what} has the class {ids[y, x]} at x={x}, y={y}; classes are {allowed}, and "
                f"ignore_index={self.ignore_index} where there is none.{hint}"
            )
        return ids.astype(np.int32)


def black_and_white(classes: Collection[int], ignored: bool, ignore_index: int | None) -> str:
    """What to say of masks that look as if 255 were meant for a class; empty where they do not.

    Args:
        classes: Ids that occur, without `ignore_index`.
        ignored: Whether pixels with `ignore_index` occur.
        ignore_index: Of the masks.
    """
    if ignored and ignore_index == IGNORE_INDEX and len(classes) < 2:
        told = "their pixels of 255 count for no class (ignore_index=255)"
    elif sorted(classes) == [0, IGNORE_INDEX]:
        told = "their 255 is no class of these"
    else:
        return ""
    return f" Are they black and white? Then {told}: store ids 0 and 1 (mask // 255), or images of mode '1'."


def _of_image(value: Any, what: str, palette: Palette | None) -> np.ndarray:
    image = read_decoded(value, what)
    if palette is not None:
        try:
            return palette.ids(image)
        except ValueError as error:
            raise ValueError(f"{what}{place_of(value)}: {error}") from error
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"{what}{place_of(value)} is an image of mode {image.mode!r}, which shows colours; a mask holds class "
            "ids: store it as 'L', 'P' (the numbers of the palette are the ids), 'I;16' or 'I', or as an array; or "
            "name the colour of each class, where there is `mask_colours`."
        )
    return np.asarray(image).astype(np.int64)


def _of_array(value: Any, what: str) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError:  # rows of unequal length
        ids = np.empty(0, dtype=object)
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(f"{what} is no rectangle of whole numbers (H, W); got {ids.dtype} of shape {ids.shape}.")
    return ids.astype(np.int64)
