"""What a readout head is trained on: images with their labels, triplets, or pairs with corresponding points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import datasets

from diffusers_repr.config.recipe import json_mapping, setting
from diffusers_repr.data.groups import GroupData
from diffusers_repr.data.splits import open_split
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import sobel_edges
from diffusers_repr.objectives.readout import ReadoutConfig

# Field of `RowsConfig` with the column of each image in a row, for each kind of head.
IMAGES = {
    "spatial": ("image_column",),
    "depth": ("image_column",),
    "appearance": ("image_column", "positive_column", "negative_column"),
    "correspondence": ("image_column", "second_column"),
}


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The data set and its columns; which of them are read depends on the kind of head.

    Raises:
        ValueError: If a number is not positive.
    """

    dataset_name: str = setting("digits", "a folder, a .parquet file, a Hub id, or digits")
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


class ReadoutRows(GroupData):
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
        self.reads_edges = readout.reads_labels and readout.target == "edges"
        super().__init__(
            data,
            [getattr(config, field) for field in IMAGES[readout.kind]],
            channels,
            size,
            label=config.label_column if readout.reads_labels and not self.reads_edges else None,
            label_channels=json_mapping("head", readout.head).get("out_channels", 1),
            label_range=readout.label_range or (-1.0, 1.0),
            points=(config.points_column, config.second_points_column) if readout.kind == "correspondence" else (),
            max_points=config.max_points,
            flip=config.random_flip,
            cache=config.cache_images,
        )

    @classmethod
    def load(cls, config: RowsConfig, readout: ReadoutConfig, denoiser: Denoiser) -> ReadoutRows:
        """The rows of the data set that `config` names, at its resolution or that of the denoiser.

        Raises:
            FileNotFoundError, ValueError: As `open_split`, and as the class.
        """
        size = denoiser.image_size if config.resolution is None else (config.resolution, config.resolution)
        data = open_split(config.dataset_name, config.dataset_split)
        return cls(data, config, readout, denoiser.image_channels, size)

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As `GroupData.on_device`; edges are computed from the images."""
        found = super().on_device(batch)
        if self.reads_edges:
            found["label"] = sobel_edges(found["images"][0])
        return found
