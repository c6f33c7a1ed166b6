"""Training data behind one interface: image folders, `datasets` ids, Parquet, in memory, streamed or from a cache."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_column import ImagePixels, raw_bytes
from diffusers_repr.data.image_data import choose_columns, open_split
from diffusers_repr.data.label_column import read_labels
from diffusers_repr.data.transforms import augment, check_crop, to_unit

if TYPE_CHECKING:
    from diffusers_repr.data.stream import StreamData

_SAMPLED = 64  # images whose bytes enter a fingerprint


class TrainData(Dataset, ABC):
    """Map-style training data; sample n of a run is `permutation(seed, epoch)[n mod N]`, see `order.batch_indices`.

    `data[i]` is a dict of CPU tensors that `torch.utils.data.default_collate` joins; `on_device` brings the joined
    batch, once it is on the device, to what an objective takes.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as objectives take it, in a dict of its own.

        `pixel_values` are float32 in [-1, 1], augmented by draws from the global generator of the batch's device.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the data are, as JSON: equal for equal data, wherever they lie; no setting of the augmentation."""

    @property
    @abstractmethod
    def class_names(self) -> list[str] | None:
        """Name of each class id; None without labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.class_names is None else len(self.class_names)


class ImageTrainData(TrainData):
    """Images with labels and captions from a `datasets.Dataset`.

    Args:
        dataset: Map-style, with a column of images.
        config: Columns, crop, augmentation and what to do with unreadable images.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W) of the pixels.
        name: For messages.

    Attributes:
        images: The uint8 pixels.
        config: As given.

    A sample has `pixel_values` (uint8, C, H, W), `index` (place in the data set, int64), and, where the data have
    them, `class_labels` (int64, -1 for none) and `caption` (str, empty for none).

    Raises:
        ValueError: For columns that are not there or hold something else, missing labels, a crop that does not fit.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        config: DataConfig,
        channels: int,
        size: tuple[int, int],
        name: str = "the data set",
    ) -> None:
        check_crop(config.center_crop, size)
        image_column, label_column = find_columns(dataset.features, config, name)
        labels = None if label_column is None else read_labels(dataset, label_column, config.missing_labels)
        self.config = config
        self.images = ImagePixels(
            dataset, image_column, channels, size, config.cache_images, config.center_crop, config.bad_images
        )
        self._labels = labels
        self._captions = None
        if config.caption_column is not None:
            self._captions = dataset.with_format(None).select_columns([config.caption_column])
        self._fingerprint: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, pixels = self.images.read(index)
        return {"pixel_values": pixels, **self.annotations(row)}

    def annotations(self, row: int) -> dict[str, Any]:
        """A sample without its image: `index`, and `class_labels` and `caption` where there are such."""
        sample: dict[str, Any] = {"index": torch.tensor(row)}
        if self._labels is not None:
            sample["class_labels"] = torch.tensor(self._labels.ids[row])
        if self._captions is not None:
            sample["caption"] = self._captions[row][self.config.caption_column] or ""
        return sample

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `TrainData`; the draws are those of `transforms.augment`."""
        return {**batch, "pixel_values": augmented(to_unit(batch["pixel_values"]), self.config)}

    def fingerprint(self) -> dict[str, Any]:
        """See `TrainData`: number of rows, hashes of evenly spread images and of all labels, geometry."""
        if self._fingerprint is None:
            rows = np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int))
            labels = None if self._labels is None else hashed([self._labels.ids.tobytes()])
            self._fingerprint = {
                "rows": len(self),
                "images": hashed(raw_bytes(self.images.raw(int(row))) for row in rows),
                "labels": labels,
                "classes": self.class_names,
                "captions": self.config.caption_column,
                **geometry(self.config, len(self.images.mode), self.images.size),
            }
        return json.loads(json.dumps(self._fingerprint))

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
        rows, pixels = self.images.gather(indices)
        batch: dict[str, Any] = {"pixel_values": pixels, "index": rows}
        if self._labels is not None:
            batch["class_labels"] = torch.from_numpy(self._labels.ids[rows.numpy()])
        if self._captions is not None:
            batch["caption"] = [self.annotations(int(row))["caption"] for row in rows]
        return batch


def load_train_data(
    config: DataConfig,
    channels: int,
    size: int | tuple[int, int] | None = None,
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    vae: Any = None,
    encoders: Sequence[Any] = (),
    needs_pixels: bool = False,
) -> TrainData | StreamData:
    """The training data of a run: images, a stream of them, or a cache over them.

    Args:
        config: See `DataConfig`.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) that the model, its VAE included, takes; `config.resolution` if None.
        dataset: The split itself, in place of `config.dataset_name`.
        seed: Of a stream's order; map-style data are ordered by the loop.
        rank: This process, for a stream.
        world_size: Number of processes, for a stream.
        num_workers: Threads that decode the images of a stream; other data leave it to the loader.
        vae: The run's VAE; a latent cache must have been made with it.
        encoders: The run's teachers; a feature cache must have been made with them.
        needs_pixels: Load images even where latents are cached, for a teacher that is not.

    Raises:
        FileNotFoundError: If the data set or a cache is not there.
        ValueError: If columns or settings do not fit, or a cache was made otherwise or is not finished.
    """
    height_width = config.size(size)
    name = config.dataset_name or "the data set"
    if dataset is None:
        if config.dataset_name is None:
            raise ValueError("No data set; pass --dataset_name, a folder, a .parquet file or a Hub id.")
        dataset = open_split(config.dataset_name, config.dataset_split, config.dataset_revision, config.streaming)
    if isinstance(dataset, datasets.IterableDataset):
        from diffusers_repr.data.stream import StreamData

        if config.latents_dir or config.features_dir:
            raise ValueError("A stream has no places in the data set to keep latents or features by.")
        return StreamData(dataset, config, channels, height_width, seed, rank, world_size, num_workers, name)
    if config.streaming:
        raise ValueError(f"`streaming` is set, but {name} was given as a map-style data set; leave it out.")
    kind = InMemoryTrainData if config.cache_images else ImageTrainData
    images = kind(dataset, config, channels, height_width, name)
    if not (config.latents_dir or config.features_dir):
        return images
    from diffusers_repr.data.cached import CachedData

    return CachedData.open(images, vae=vae, encoders=encoders, needs_pixels=needs_pixels)


def find_columns(features: Mapping[str, Any], config: DataConfig, name: str) -> tuple[str, str | None]:
    """Columns of images and of class ids (None: no labels) that a configuration chooses.

    Args:
        features: Type of each column, as `datasets` has them.
        config: Names of columns, or none.
        name: Of the data set, for messages.

    Raises:
        ValueError: For columns, that of texts included, that are not there or hold something else.
    """
    without_labels = config.label_column == "none"
    images, labels = choose_columns(
        features, config.image_column, None if without_labels else config.label_column, name
    )
    if config.caption_column is not None:
        kinds = {column: getattr(kind, "dtype", type(kind).__name__) for column, kind in features.items()}
        if kinds.get(config.caption_column) not in ("string", "large_string"):
            raise ValueError(f"No column {config.caption_column!r} of texts in {name}; its columns are {kinds}.")
    return images, None if without_labels else labels


def augmented(pixels: Tensor, config: DataConfig) -> Tensor:
    """`transforms.augment` of pixels in [-1, 1] by a configuration's settings."""
    return augment(pixels, config.random_flip, config.random_rotation, config.random_shift, config.random_scale)


def geometry(config: DataConfig, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """How images become pixels, as JSON."""
    return {"channels": channels, "size": list(size), "center_crop": config.center_crop}


def hashed(parts: Any) -> str:
    """A short hash of byte strings, told apart by their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
