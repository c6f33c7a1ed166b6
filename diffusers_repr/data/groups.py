"""`GroupData`: rows of several images, such as pairs with points that correspond, or triplets, and maps as labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from diffusers_repr.data.base import TrainData, hashed, spread_rows
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import raw_bytes
from diffusers_repr.data.placement import Placement
from diffusers_repr.data.points import pad_points, parse_points
from diffusers_repr.data.transforms import Moves, to_unit


class GroupData(TrainData):
    """Rows of K images each, with a map that labels the first, or with points that correspond in all of them.

    Args:
        data: Map-style.
        columns: Of the K images.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) of the images, after their largest centred crop.
        label: Column of images that show the label.
        label_channels: Of these.
        label_range: Black and white of these, as numbers.
        points: Columns of the points of each image, `[y, x]` in pixels, or `[y, x, visible]` with 0 for those that
            are not; those outside of an image are not valid.
        x_first: Points stand as `[x, y]` in the data; samples and batches have `[y, x]` in any case.
        max_points: Points of a row, the first.
        flip: Mirror half of the rows, images and labels together.
        cache: Decode every image once and keep it in memory.

    Attributes:
        images: One `ImagePixels` a column.
        labels: That of the labels; None without.
        size: As given.

    Raises:
        ValueError: For columns that are not there or hold something else; for mirrored images of points.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        columns: Sequence[str],
        channels: int,
        size: tuple[int, int],
        *,
        label: str | None = None,
        label_channels: int = 1,
        label_range: Sequence[float] = (-1.0, 1.0),
        points: Sequence[str] = (),
        x_first: bool = False,
        max_points: int = 64,
        flip: bool = False,
        cache: bool = False,
    ) -> None:
        if flip and points:
            raise ValueError("`random_flip` would move images off their points; drop it where there are points.")
        missing = [name for name in points if name not in data.features]
        if missing:
            raise ValueError(f"No column {missing[0]!r} of points among {list(data.features)}; see --points_column.")
        self.size, self.flip, self.max_points, self.label_range = size, flip, max_points, label_range
        self.x_first = x_first
        self.images = [ImagePixels(data, column, channels, size, cache) for column in columns]
        self.labels = None if label is None else ImagePixels(data, label, label_channels, size, cache)
        self._points, self._data, self._only_points = list(points), data, data.select_columns(list(points))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`images` (K, C, H, W) uint8; `label` (c, H, W) uint8; `points` (K, P, 2) and which of them are `valid`."""
        sample: dict[str, Any] = {"images": torch.stack([images[index] for images in self.images])}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        if self._points:
            row = self._data[index]
            sizes = [row[images.column].size[::-1] for images in self.images]
            read = [
                parse_points(points, f"The {name!r} of row {index}")
                for points, name in zip(self._stored(index), self._points, strict=True)
            ]
            if len({len(points) for points, _ in read}) > 1:
                told = " and ".join(f"{len(p)} in {name!r}" for (p, _), name in zip(read, self._points, strict=True))
                raise ValueError(f"Row {index} has {told}; points correspond one to one.")
            held = [
                fit_points(points.flip(-1) if self.x_first else points, size, self.size, self.max_points, visible)
                for (points, visible), size in zip(read, sizes, strict=True)
            ]
            sample["points"] = torch.stack([points for points, _ in held])
            sample["valid"] = torch.stack([valid for _, valid in held]).all(0)
        return sample

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`images` (K, B, C, H, W) in [-1, 1]; `label` (B, c, H, W) in its range; `points` (K, B, P, 2)."""
        batch = {**batch, "images": to_unit(batch["images"].transpose(0, 1))}
        moves = Moves.draw(batch["images"].shape[1], batch["images"].device, self.flip, 0, 0, 0)
        batch["images"] = torch.stack([moves.images(images) for images in batch["images"]])
        if "label" in batch:
            low, high = self.label_range
            batch["label"] = moves.images(low + (high - low) * batch["label"].float() / 255)
        if "points" in batch:
            batch["points"] = batch["points"].transpose(0, 1)
        return batch

    def fingerprint(self) -> dict[str, Any]:
        """Number and size of the rows, and hashes of some of them, spread evenly."""
        rows = spread_rows(len(self))
        pixels = [*self.images, *([] if self.labels is None else [self.labels])]
        return {
            "rows": len(self),
            "size": list(self.size),
            "images": [hashed(raw_bytes(part.raw(row)) for row in rows) for part in pixels],
            "points": hashed(json.dumps(self._stored(row)).encode() for row in rows) if self._points else None,
        }

    @property
    def class_names(self) -> None:
        """None: there are no class ids."""
        return None

    def _stored(self, index: int) -> list[Any]:
        row = self._only_points[index]
        return [row[name] for name in self._points]


def fit_points(
    points: Tensor, size: tuple[int, int], fitted: tuple[int, int], count: int, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Points (P, 2) as (y, x) of an image after its largest centred crop was scaled from `size` to `fitted`.

    Returns the first `count` of them, padded with zeros, and which of these are visible points inside the crop.
    """
    moved, inside = Placement.of(size, fitted, "fit").points(points.double().flip(-1))
    return pad_points(moved.flip(-1), inside if visible is None else inside & visible, count)
