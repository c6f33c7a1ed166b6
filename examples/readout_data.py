"""What a readout head is trained on: images with their labels, triplets, or pairs with corresponding points."""

import dataclasses
import json

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from readout_args import ReadoutConfig
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.data import TrainData
from diffusers_repr.data.base import hashed
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import raw_bytes
from diffusers_repr.data.transforms import draw_flips, to_unit
from diffusers_repr.heads import sobel_edges

# Field of `RowsConfig` with the column of each image in a row, for each kind of head.
IMAGES = {
    "spatial": ("image_column",),
    "depth": ("image_column",),
    "appearance": ("image_column", "positive_column", "negative_column"),
    "correspondence": ("image_column", "second_column"),
}
_SAMPLED = 64  # rows whose bytes enter a fingerprint


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The data set and its columns; which of them are read depends on the kind of head."""

    dataset_name: str = setting("digits", "digits, or a path or Hub id for `datasets`")
    dataset_split: str = setting("train", "split to train on")
    image_column: str = setting("image", "images; for correspondence the first of each pair")
    label_column: str = setting("label_image", "images that show the label; grey where the head has one channel")
    positive_column: str = setting("positive", "appearance: another view of the same subject")
    negative_column: str = setting("negative", "appearance: the image with another look")
    second_column: str = setting("second_image", "correspondence: the second image of each pair")
    points_column: str = setting("points", "correspondence: [y, x] points of the first image, in pixels")
    second_points_column: str = setting("second_points", "the same points in the second image")
    max_points: int = setting(64, "points of a pair that are used")
    resolution: int | None = setting(None, "side of the images; default: that of the base")
    random_flip: bool = setting(False, "mirror half of the images with their labels")
    cache_images: bool = setting(False, "decode every image once and keep it in memory")

    def __post_init__(self) -> None:
        for name in ("max_points", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")


class ReadoutRows(TrainData):
    """Rows of a data set: images, and labels or points with them.

    Args:
        data: Map-style.
        config: Its columns.
        readout: Tells which of them are read, and what labels mean.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) of the images.

    Raises:
        ValueError: For columns that are not there or hold something else; for mirrored images of points.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        config: RowsConfig,
        readout: ReadoutConfig,
        channels: int,
        size: tuple[int, int],
    ) -> None:
        if config.random_flip and readout.kind == "correspondence":
            raise ValueError("`random_flip` would move images off their points; drop it for kind: correspondence.")
        self.data, self.config, self.readout, self.size = data, config, readout, size
        columns = [getattr(config, field) for field in IMAGES[readout.kind]]
        self.images = [ImagePixels(data, column, channels, size, config.cache_images) for column in columns]
        self.labels = None
        if readout.reads_labels and readout.target != "edges":
            shown = readout.head.get("out_channels", 1)
            self.labels = ImagePixels(data, config.label_column, shown, size, config.cache_images)
        self.points = None
        if readout.kind == "correspondence":
            names = [config.points_column, config.second_points_column]
            missing = [name for name in names if name not in data.features]
            if missing:
                raise ValueError(
                    f"No column {missing[0]!r} of points among {list(data.features)}; see --points_column."
                )
            self.points = data.select_columns(names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        """`images` (K, C, H, W) uint8; `label` (c, H, W) uint8; `points` (2, P, 2) and which of them are `valid`."""
        sample = {"images": torch.stack([images[index] for images in self.images])}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        if self.points is not None:
            row, count = self.data[index], self.config.max_points
            fitted = [
                fit_points(torch.tensor(points).reshape(-1, 2), row[images.column].size[::-1], self.size, count)
                for images, points in zip(self.images, self.points_of(index), strict=True)
            ]
            sample["points"] = torch.stack([points for points, _ in fitted])
            sample["valid"] = fitted[0][1] & fitted[1][1]
        return sample

    def points_of(self, index: int) -> list:
        """The [y, x] of both images of a row."""
        row = self.points[index]
        return [row[self.config.points_column], row[self.config.second_points_column]]

    def on_device(self, batch: dict) -> dict:
        """`images` (K, B, C, H, W) in [-1, 1]; `label` (B, c, H, W) in its range; `points` (2, B, P, 2)."""
        batch = {**batch, "images": to_unit(batch["images"].transpose(0, 1))}
        if "label" in batch:
            low, high = self.readout.label_range
            batch["label"] = low + (high - low) * batch["label"].float() / 255
        if self.config.random_flip:
            mirror = draw_flips(batch["images"].shape[1], batch["images"].device)[:, None, None, None]
            batch = {name: torch.where(mirror, value.flip(-1), value) for name, value in batch.items()}
        if self.readout.reads_labels and "label" not in batch:
            batch["label"] = sobel_edges(batch["images"][0])
        if "points" in batch:
            batch["points"] = batch["points"].transpose(0, 1)
        return batch

    def fingerprint(self) -> dict:
        """Number and size of the rows, and hashes of some of them, spread evenly."""
        rows = np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)).tolist()
        pixels = [*self.images, *([] if self.labels is None else [self.labels])]
        return {
            "rows": len(self),
            "size": list(self.size),
            "images": [hashed(raw_bytes(part.raw(row)) for row in rows) for part in pixels],
            "points": self.points and hashed(json.dumps(self.points_of(row)).encode() for row in rows),
        }

    @property
    def class_names(self) -> None:
        return None


def fit_points(points: Tensor, size: tuple[int, int], fitted: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Points (P, 2) as (y, x) of an image after its largest centred crop was scaled from `size` to `fitted`.

    Returns the first `count` of them, padded with zeros, and which of these are points inside the crop.
    """
    old, new = torch.tensor(size, dtype=torch.float32), torch.tensor(fitted, dtype=torch.float32)
    scale = (new / old).max()
    moved = (points[:count] + 0.5 - old / 2) * scale + new / 2 - 0.5
    inside = ((moved >= -0.5) & (moved <= new - 0.5)).all(1)
    room = count - len(moved)
    return F.pad(moved, (0, 0, 0, room)), F.pad(inside, (0, room))
