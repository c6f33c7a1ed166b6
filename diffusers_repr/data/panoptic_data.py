"""Images with panoptic masks, to train on and to measure by, held in memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.data.base import TrainData, hashed
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import raw_bytes
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.data.splits import open_split
from diffusers_repr.data.transforms import to_unit

_SAMPLED = 64  # rows whose bytes enter a fingerprint


@dataclasses.dataclass(frozen=True)
class PanopticConfig:
    """The data set, its columns, and which classes are learned."""

    dataset_name: str | None = setting(None, "a folder, a .parquet file, or a Hub id")
    dataset_split: str = setting("train", "split to train on")
    image_column: str = setting("image", "the images")
    panoptic_column: str = setting("panoptic", "of each image an image with the id of the segment of every pixel")
    segments_column: str = setting("segments", "of each image its segments: `id` and class")
    class_key: str = setting("class", "class of a segment, a ClassLabel; of several, as in 'colour kind', all names")
    ground: str | None = setting(None, "class of the pixels with id 0; default: they are void, of no class")
    exclude: list[str] | None = setting(None, "classes not learned: images that show one are left out, and its name")

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ValueError("No data; pass --dataset_name, a folder, a .parquet file or a Hub id.")
        if not self.class_key.split():
            raise ValueError("class_key is empty; it names what tells a segment's class.")


class PanopticTrainData(TrainData):
    """Images of one size with the id of every pixel's segment.

    Args:
        data: Map-style, with the columns of `config`; masks have the size of their image, and images that of `size`.
        config: Columns and classes.
        channels: Of the images.
        size: (H, W).

    Raises:
        ValueError: For columns and classes that are not there, and images without a segment.
    """

    def __init__(self, data: datasets.Dataset, config: PanopticConfig, channels: int, size: tuple[int, int]) -> None:
        columns = (config.image_column, config.panoptic_column, config.segments_column)
        missing = [name for name in columns if name not in data.column_names]
        if missing:
            raise ValueError(f"There is no column {missing[0]!r}; the data have {', '.join(data.column_names)}.")
        names, listed = _labelled(data, config)
        wrong = [name for name in config.exclude or () if name not in names]
        if wrong:
            raise ValueError(f"`exclude` names {wrong[0]!r}; the classes are {', '.join(names)}.")
        barred = {names.index(name) for name in config.exclude or ()}
        kept = [at for at, rows in enumerate(listed) if rows and not barred & {label for _, label in rows}]
        if not kept:
            raise ValueError("No image with a segment is left to learn from.")
        left = [at for at in range(len(names)) if at not in barred]
        self._names = [names[at] for at in left] + ([config.ground] if config.ground is not None else [])
        place = {at: new for new, at in enumerate(left)}
        self.config, self.size = config, size
        self._segments = [[(number, place[label]) for number, label in listed[at]] for at in kept]
        self._most = 1 + max(map(len, self._segments))
        chosen = data.select(kept)
        self.images = ImagePixels(chosen, config.image_column, channels, size, cache=True)
        self._ids = self._read(chosen)

    def _read(self, data: datasets.Dataset) -> Tensor:
        """`(N, H, W)` uint8 or int32: 0 void, n the nth segment, the ground behind the others."""
        found = torch.zeros(len(data), *self.size, dtype=torch.uint8 if self._most < 256 else torch.int32)
        for at, picture in enumerate(data[self.config.panoptic_column]):
            raw = np.asarray(picture)
            if raw.shape != self.size:
                raise ValueError(f"The mask of row {at} is {raw.shape}, its image {self.size}; they must be alike.")
            for place, (number, _) in enumerate(self._segments[at], start=1):
                found[at][torch.from_numpy(raw == number)] = place
            if self.config.ground is not None:
                found[at][torch.from_numpy(raw == 0)] = len(self._segments[at]) + 1
        return found

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (C, H, W) uint8, `panoptic` (H, W) ids from 1, `segment_classes` (S,) with -1 for none."""
        classes = torch.full((self._most,), -1)
        own = [label for _, label in self._segments[index]]
        own += [len(self._names) - 1] if self.config.ground is not None else []
        classes[: len(own)] = torch.tensor(own)
        return {"pixel_values": self.images[index], "panoptic": self._ids[index], "segment_classes": classes}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`pixel_values` in [-1, 1], the others as they are."""
        return {**batch, "pixel_values": to_unit(batch["pixel_values"])}

    def fingerprint(self) -> dict[str, Any]:
        """Number and size of the images, hashes of some and of all masks, the classes."""
        rows = sorted({round(at * (len(self) - 1) / (_SAMPLED - 1)) for at in range(_SAMPLED)})
        return {
            "rows": len(self),
            "size": list(self.size),
            "images": hashed(raw_bytes(self.images.raw(row)) for row in rows),
            "masks": hashed([self._ids.numpy().tobytes()]),
            "classes": self._names,
        }

    @property
    def class_names(self) -> list[str]:
        """Name of each class that is learned, the ground's last."""
        return self._names


def _labelled(data: datasets.Dataset, config: PanopticConfig) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Names of the classes, and of each row the id and class of its segments."""
    feature: Any = getattr(data.features[config.segments_column], "feature", None)
    fields, keys = (feature if isinstance(feature, Mapping) else {}), config.class_key.split()
    labels: list[Any] = [fields.get(key) for key in keys]
    for key, label in zip(keys, labels, strict=True):
        if not isinstance(label, datasets.ClassLabel) or "id" not in fields:
            raise ValueError(
                f"{config.segments_column!r} must be a list of segments with `id` and {key!r}, a ClassLabel; it is "
                f"{data.features[config.segments_column]}."
            )
    shape = [len(label.names) for label in labels]
    names = [" ".join(parts) for parts in itertools.product(*(label.names for label in labels))]
    listed = [
        [(row["id"], int(np.ravel_multi_index([row[key] for key in keys], shape))) for row in rows]
        for rows in data[config.segments_column]
    ]
    return names, listed


def to_maps(ids: Tensor, classes: Tensor) -> list[PanopticMap]:
    """Maps of a batch: ids `(B, H, W)` from 1, and the class of the nth segment of each image, `(B, S)`.

    Segments without a pixel are left out.
    """
    maps = []
    for own, labels in zip(ids.long().cpu(), classes.tolist(), strict=True):
        present = [number for number in own.unique().tolist() if number]
        maps.append(PanopticMap(own, {number: labels[number - 1] for number in present}))
    return maps


def load_panoptic(config: PanopticConfig, channels: int, size: tuple[int, int]) -> PanopticTrainData:
    """The data set that a configuration names.

    Raises:
        FileNotFoundError, ValueError: As `open_split`, and as `PanopticTrainData`.
    """
    assert config.dataset_name is not None
    return PanopticTrainData(open_split(config.dataset_name, config.dataset_split), config, channels, size)


__all__ = ["PanopticConfig", "PanopticTrainData", "load_panoptic", "to_maps"]
