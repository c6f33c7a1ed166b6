"""Images with what is known of them, to train on: from a folder, `datasets` ids, Parquet, or held in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from diffusers_repr.data.assigned import AssignedConditions, open_assigned
from diffusers_repr.data.base import TrainData, augmented, geometry, hashed, spread_rows
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import raw_bytes
from diffusers_repr.data.label_column import ClassLabels, read_labels
from diffusers_repr.data.points import most_points
from diffusers_repr.data.transforms import check_crop


class ImageTrainData(TrainData):
    """Images with labels and captions from a `datasets.Dataset`.

    Args:
        dataset: Map-style, with a column of images.
        config: Columns, crop, augmentation and what to do with unreadable images.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W) of the pixels.
        name: Of the data set, for messages and cards; what it calls itself if None.

    Attributes:
        images: The uint8 pixels.
        name: Of the data set; None if it has none.
        config: As given.
        masks: Names of the classes of pixels; None without masks.
        assigned: What `assignments_dir` holds; None without.

    A sample has `pixel_values` (uint8, C, H, W), `index` (place in the data set, int64), and, where the data have
    them, `class_labels` (int64, -1 for none), `caption` (str, empty for none), `masks` (int32, H, W), and `points`
    (float32, P, 2, as x and y) with `visible` (bool, P). With `assignments_dir`, classes that were assigned are the
    `class_labels`, and vectors (D,) or the vectors of neighbours (k, D), float32, are the `condition`.

    Raises:
        ValueError: For columns that are not there or hold something else, missing labels, a crop that does not fit,
            and assignments of other images.
        FileNotFoundError: If the assignments are not there.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        config: DataConfig,
        channels: int,
        size: tuple[int, int],
        name: str | None = None,
    ) -> None:
        check_crop(config.center_crop, size)
        self.name = name or dataset.info.dataset_name
        columns = config.columns(dataset.features, self.name or "the data set")
        self._captions = None if columns.caption is None else dataset.with_format(None).select_columns(columns.caption)
        self.config, self.masks = config, config.masks(dataset.features)
        most = config.max_points or (1 if columns.points is None else most_points(dataset, columns.points))
        self.images = ImagePixels(
            dataset, columns.image, channels, size, config.cache_images, config.center_crop, config.bad_images,
            columns.mask, columns.points, self.masks, most,
        )  # fmt: skip
        self._fingerprint: dict[str, Any] | None = None
        self.assigned: AssignedConditions | None = None
        self._labels: ClassLabels | None = None
        if config.assignments_dir is not None:
            self.assigned = open_assigned(config, len(self), self._images_hash())
            self._labels = self.assigned.labels
        if self._labels is None and columns.label is not None:
            self._labels = read_labels(dataset, columns.label, config.missing_labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, tensors = self.images.sample(index)
        return {**tensors, **self.annotations(row)}

    def annotations(self, row: int) -> dict[str, Any]:
        """A sample without what lies on its image: `index`, and `class_labels` and `caption` where there are such."""
        sample: dict[str, Any] = {"index": torch.tensor(row)}
        if self._labels is not None:
            sample["class_labels"] = torch.tensor(self._labels.ids[row])
        if self._captions is not None:
            sample["caption"] = self._captions[row][self.config.caption_column] or ""
        if self.assigned is not None and self.assigned.has_values:
            sample["condition"] = self.assigned.values(sample["index"])
        return sample

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `TrainData`; the draws are those of `transforms.augment`."""
        return augmented(batch, self.config)

    def fingerprint(self) -> dict[str, Any]:
        """See `TrainData`: number of rows, hashes of evenly spread images and of all labels, geometry."""
        if self._fingerprint is None:
            rows = spread_rows(len(self))
            labels = None if self._labels is None else hashed([self._labels.ids.tobytes()])
            self._fingerprint = {
                "rows": len(self),
                "images": self._images_hash(),
                "labels": labels,
                "classes": self.class_names,
                "captions": self.config.caption_column,
                **geometry(self.config, len(self.images.mode), self.images.size),
            }
            for kind, column in (("masks", self.config.mask_column), ("points", self.config.points_column)):
                if column is not None:
                    self._fingerprint[kind] = hashed(raw_bytes(self.images.stored(row)[column]) for row in rows)
            if self.assigned is not None:
                self._fingerprint["assignments"] = self.assigned.fingerprint()
        return json.loads(json.dumps(self._fingerprint))

    def _images_hash(self) -> str:
        return hashed(raw_bytes(self.images.raw(row)) for row in spread_rows(len(self)))

    @property
    def labels(self) -> np.ndarray | None:
        """Class id of every row, -1 where there is none; None without labels."""
        return None if self._labels is None else self._labels.ids

    @property
    def class_names(self) -> list[str] | None:
        """See `TrainData`."""
        return None if self._labels is None else self._labels.names


class InMemoryTrainData(ImageTrainData):
    """`ImageTrainData` with `cache_images`: `batch` gives whole batches, without a sample's own tensors between."""

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What joining `self[i]` for each of `indices` gives."""
        rows, tensors = self.images.gather(indices)
        batch: dict[str, Any] = {**tensors, "index": rows}
        if self._labels is not None:
            batch["class_labels"] = torch.from_numpy(self._labels.ids[rows.numpy()])
        if self._captions is not None:
            batch["caption"] = [self.annotations(int(row))["caption"] for row in rows]
        if self.assigned is not None and self.assigned.has_values:
            batch["condition"] = self.assigned.values(rows)
        return batch
