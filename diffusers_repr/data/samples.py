"""One reader of a row: its image, and the mask and points on it, upright, checked and cropped together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.data.columns import Columns
from diffusers_repr.data.image_files import UnreadableImage, place_of, read_image, undecoded
from diffusers_repr.data.masks import MaskColumn
from diffusers_repr.data.placement import Crop, Placement
from diffusers_repr.data.points import pad_points, read_points
from diffusers_repr.data.transforms import check_crop, to_uint8


@dataclass(frozen=True)
class Sample:
    """An image with what lies on it, at the size it was stored in.

    Attributes:
        image: Turned as its EXIF data says.
        mask: `(H, W)` int32 class ids; None without masks.
        points: `(N, 2)` float64 as (x, y); None without points.
        visible: `(N,)` bool.
    """

    image: Image.Image
    mask: np.ndarray | None = None
    points: Tensor | None = None
    visible: Tensor | None = None


class SampleReader:
    """Rows of undecoded images to `Sample`.

    Args:
        features: Type of each column.
        columns: Which of them are read.
        masks: Of the column of masks; needed where there is one.
        title: Of the data set, for messages.
    """

    def __init__(
        self, features: Mapping[str, Any], columns: Columns, masks: MaskColumn | None = None, title: str = ""
    ) -> None:
        self.columns, self.masks, self._title = columns, masks, title
        self._mode = features[columns.image].mode
        self._files = [c for c in columns.used() if isinstance(features[c], datasets.Image)]

    def undecoded(self, data: Any) -> Any:
        """The data set (map-style or stream) with its images and masks as path and bytes."""
        for column in self._files:
            data = undecoded(data, column)
        return data

    def image(self, value: Any, number: int) -> Image.Image:
        """The image of a row.

        Args:
            value: Path and bytes, or an image.
            number: Of the row.

        Raises:
            UnreadableImage: If there is none, or as `read_image`.
        """
        row = self._row(number)
        if value is None:
            raise UnreadableImage(f"{row} has no image.")
        return read_image(value, row if self._title else f"The image of row {number}", self._mode)

    def read(self, row: Mapping[str, Any], number: int) -> Sample:
        """A row of `undecoded`.

        Raises:
            UnreadableImage: If the image or the mask is not there or cannot be read.
            ValueError: If the mask or the points do not fit the image.
        """
        image = self.image(row[self.columns.image], number)
        at, size = self._row(number).replace("Row", "row", 1), (image.height, image.width)
        mask = points = visible = None
        if self.columns.mask is not None and self.masks is not None:
            mask = self.masks.read(row[self.columns.mask], f"The mask of {at}", size)
        if self.columns.points is not None:
            points, visible = read_points(row[self.columns.points], f"The points of {at}", size)
        return Sample(image, mask, points, visible)

    def _row(self, number: int) -> str:
        return f"Row {number} of {self._title}" if self._title else f"Row {number}"


class TensorReader:
    """Rows of undecoded images to tensors of one size.

    Args:
        rows: Reads them.
        channels: 1 or 3.
        size: (H, W).
        crop: As `to_uint8`.
        max_points: Points of a row; the first of those that it has.
    """

    def __init__(
        self, rows: SampleReader, channels: int, size: tuple[int, int], crop: Crop, max_points: int = 1
    ) -> None:
        check_crop(crop, size)
        if channels not in (1, 3):
            raise ValueError(f"`model` has in_channels={channels}; images have 1 (grey) or 3 (RGB).")
        self.rows = rows
        self.channels, self.size, self.crop, self.max_points = channels, size, crop, max_points

    def read(self, row: Mapping[str, Any], number: int) -> dict[str, Tensor]:
        """The tensors of a row, by name; errors as `SampleReader.read`.

        `pixel_values` uint8 `(C, H, W)`; where there are such, `masks` int32 `(H, W)`, and `points` float32 `(P, 2)`
        as (x, y) on the crop with `visible` bool `(P,)`.
        """
        sample = self.rows.read(row, number)
        try:
            tensors = {"pixel_values": to_uint8(sample.image, self.channels, self.size, self.crop)}
        except (ValueError, OSError) as error:
            place = place_of(row[self.rows.columns.image])
            raise UnreadableImage(f"The image of row {number}{place} cannot be used: {error}.") from error
        if sample.mask is None and sample.points is None:
            return tensors
        placement = Placement.of((sample.image.height, sample.image.width), self.size, self.crop)
        if sample.mask is not None:
            tensors["masks"] = torch.from_numpy(placement.mask(sample.mask))
        if sample.points is not None and sample.visible is not None:
            points, inside = placement.points(sample.points)
            points, visible = pad_points(points, sample.visible & inside, self.max_points)
            tensors |= {"points": points, "visible": visible}
        return tensors
