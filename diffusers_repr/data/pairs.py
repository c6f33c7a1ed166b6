"""Pairs of images with key points that correspond: annotated ones, or an image and a moved copy of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.data.base import TrainData, hashed, spread_rows
from diffusers_repr.data.groups import GroupData
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import raw_bytes
from diffusers_repr.data.splits import open_split
from diffusers_repr.data.transforms import Moves, to_unit
from diffusers_repr.data.views import ViewConfig, jitter


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """The data set, and where pairs and their points come from.

    Raises:
        ValueError: If a number is out of range, or pairs that are annotated are to be moved.
    """

    dataset_name: str = setting("digits", "a folder, a .parquet file, a Hub id, or digits")
    dataset_split: str = setting("train", "split to train on")
    image_column: str = setting("image", "the first image of each pair")
    second_column: str | None = setting(None, "the second; none: the first, moved and with other colours")
    points_column: str = setting("points", "of annotated pairs: [x, y] points of the first image, in its pixels")
    second_points_column: str = setting("second_points", "the same points in the second image")
    max_points: int = setting(64, "points of a pair that are used, or drawn")
    resolution: int | None = setting(None, "side of the images; default: that of the base")
    cache_images: bool = setting(False, "decode every image once and keep it in memory")
    random_flip: bool = setting(False, "moved: mirror half of the second images")
    random_rotation: float = setting(20.0, "moved: at most by so many degrees, either way")
    random_shift: float = setting(0.1, "moved: at most by this share of the side, along each")
    random_scale: float = setting(0.2, "moved: factor on the size, 1 give or take this")
    color_jitter: float = setting(0.4, "moved: factors on brightness, contrast, saturation, 1 give or take this")

    def __post_init__(self) -> None:
        for name in ("max_points", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        bounds = {"random_rotation": 180, "random_shift": 0.5, "random_scale": 0.9, "color_jitter": 1}
        for name, high in bounds.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` lies in [0, {high}], got {getattr(self, name)}.")
        if self.second_column is not None and self.random_flip:
            raise ValueError("`random_flip` is for moved pairs, which have no `second_column`.")


class AnnotatedPairs(GroupData):
    """Rows of two images with points `[x, y]`, or `[x, y, visible]`, in both.

    Args:
        data: Map-style.
        config: Its columns; `second_column` is one.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) of the images, after their largest centred crop.

    Raises:
        ValueError: For columns that are not there or hold something else.
    """

    def __init__(self, data: datasets.Dataset, config: PairConfig, channels: int, size: tuple[int, int]) -> None:
        super().__init__(
            data,
            [config.image_column, str(config.second_column)],
            channels,
            size,
            points=(config.points_column, config.second_points_column),
            x_first=True,
            max_points=config.max_points,
            cache=config.cache_images,
        )

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`images` (2, B, C, H, W) in [-1, 1], `points` (2, B, P, 2) as (x, y), and `valid` (B, P)."""
        found = super().on_device(batch)
        return {**found, "points": found["points"].flip(-1)}


class MovedPairs(TrainData):
    """An image and a copy of it, mirrored, turned, shifted, scaled and with other colours; points by the move itself.

    Args:
        data: Map-style.
        config: How the second differs.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) of the images, after their largest centred crop.

    Raises:
        ValueError: For a column that is no image.
    """

    def __init__(self, data: datasets.Dataset, config: PairConfig, channels: int, size: tuple[int, int]) -> None:
        self.config, self.size = config, size
        self.images = ImagePixels(data, config.image_column, channels, size, config.cache_images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (C, H, W) uint8."""
        return {"pixel_values": self.images[index]}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As that of `AnnotatedPairs`; points are drawn, and valid where they are on both images."""
        first, config, (h, w) = to_unit(batch["pixel_values"]), self.config, self.size
        how = (config.random_flip, config.random_rotation, config.random_shift, config.random_scale)
        moves = Moves.draw(len(first), first.device, *how)
        strength = config.color_jitter
        colours = ViewConfig(
            jitter_probability=float(strength > 0), brightness=strength, contrast=strength, saturation=strength
        )
        second = jitter(moves.images(first), colours)
        sides = torch.tensor([w - 1, h - 1], dtype=first.dtype, device=first.device)
        points = torch.rand(len(first), config.max_points, 2, device=first.device) * sides
        visible = torch.ones(points.shape[:2], dtype=torch.bool, device=first.device)
        moved, valid = moves.points(points, visible, self.size)
        others = {key: value for key, value in batch.items() if key != "pixel_values"}
        both: dict[str, Tensor] = {"images": torch.stack([first, second]), "points": torch.stack([points, moved])}
        return {**others, **both, "valid": valid}

    def fingerprint(self) -> dict[str, Any]:
        """Number and size of the images, and a hash of some of them, spread evenly."""
        rows = spread_rows(len(self))
        return {
            "rows": len(self),
            "size": list(self.size),
            "images": hashed(raw_bytes(self.images.raw(row)) for row in rows),
        }

    @property
    def class_names(self) -> None:
        """None: there are no class ids."""
        return None


def load_pairs(config: PairConfig, channels: int, size: tuple[int, int]) -> AnnotatedPairs | MovedPairs:
    """The pairs of the data set that `config` names, at its resolution or at `size` (H, W).

    Raises:
        FileNotFoundError, ValueError: As `open_split`, and as the classes.
    """
    size = size if config.resolution is None else (config.resolution, config.resolution)
    data = open_split(config.dataset_name, config.dataset_split)
    kind = MovedPairs if config.second_column is None else AnnotatedPairs
    return kind(data, config, channels, size)


__all__ = ["AnnotatedPairs", "MovedPairs", "PairConfig", "load_pairs"]
