"""`Placement`: where a crop lies in its image, so that masks and points go where the pixels go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Crop = Literal["adm", "fit"]
CROPS = ("adm", "fit")


@dataclass(frozen=True)
class Span:
    """One axis of a crop: `length / unit` pixels of the source from its edge at `start / unit`, scaled to `size`."""

    start: int
    length: int
    unit: int
    size: int

    def sources(self) -> np.ndarray:
        """`(size,)`: the pixel of the source in which the centre of each pixel of the result lies, exactly."""
        twice = 2 * np.arange(self.size, dtype=np.int64) + 1
        return (2 * self.size * self.start + twice * self.length) // (2 * self.size * self.unit)

    def move(self, values: Tensor) -> Tensor:
        """Coordinates in the source to coordinates in the result; pixel centres are whole numbers in both."""
        return ((values + 0.5) * self.unit - self.start) * (self.size / self.length) - 0.5


@dataclass(frozen=True)
class Placement:
    """A crop of an image, scaled to a size, as a map of coordinates.

    Attributes:
        rows: Along the height.
        columns: Along the width.
    """

    rows: Span
    columns: Span

    @classmethod
    def of(cls, source: tuple[int, int], size: tuple[int, int], crop: Crop | Literal["stretch"]) -> Placement:
        """The placement of a crop.

        Args:
            source: (H, W) of the image.
            size: (H, W) of the result.
            crop: `adm` and `fit` as `to_uint8` crops; `stretch`: the whole image, as `to_pixels` resizes.

        Example:
            >>> Placement.of((4, 8), (2, 2), "fit").points(torch.tensor([[2.5, 0.5], [0.0, 0.0]]))
            (tensor([[ 0.0000,  0.0000],
                    [-1.2500, -0.2500]]), tensor([ True, False]))
        """
        (h, w), (height, width) = source, size
        if crop == "stretch":
            return cls(Span(0, h, 1, height), Span(0, w, 1, width))
        if crop == "fit":  # the longer side loses the same at both ends
            if w * height >= h * width:
                cut = Span(w * height - h * width, 2 * h * width, 2 * height, width)
                return cls(Span(0, h, 1, height), cut)
            cut = Span(h * width - w * height, 2 * w * height, 2 * width, height)
            return cls(cut, Span(0, w, 1, width))
        *_, (wide, high) = adm_sizes((w, h), width)
        left, top = (wide - width) // 2, (high - height) // 2
        return cls(Span(top * h, height * h, high, height), Span(left * w, width * w, wide, width))

    def points(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points after the crop.

        Args:
            points: `(N, 2)` as (x, y) in pixels of the image; the centre of the first pixel is (0, 0).

        Returns:
            `(N, 2)` in pixels of the result, and `(N,)` which of them lie on it.
        """
        moved = torch.stack([self.columns.move(points[:, 0]), self.rows.move(points[:, 1])], dim=1)
        return moved, on_image(moved, (self.rows.size, self.columns.size))

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """`(H, W)` class ids after the crop: of each pixel that of the nearest one, so that no new id comes up."""
        return mask[self.rows.sources()[:, None], self.columns.sources()]


def adm_sizes(size: tuple[int, int], side: int) -> Iterator[tuple[int, int]]:
    """(width, height) that ADM's crop goes through: halves while the shorter side is twice `side`, then the last."""
    while min(size) >= 2 * side:
        size = (size[0] // 2, size[1] // 2)
        yield size
    scale = side / min(size)
    yield round(size[0] * scale), round(size[1] * scale)


def on_image(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of `(..., 2)` points (x, y) lie on an image of `size` (H, W): those whose nearest pixel is on it."""
    bound = points.new_tensor([size[1], size[0]]) - 0.5
    return ((points >= -0.5) & (points < bound)).all(-1)
