"""`TrainData`, what training reads, and what its kinds share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.transforms import Moves, move_annotations, to_unit


class TrainData(Dataset, ABC):
    """Map-style training data; sample n of a run is `permutation(seed, epoch)[n mod N]`, see `order.batch_indices`.

    `data[i]` is a dict of CPU tensors that `torch.utils.data.default_collate` joins; `on_device` brings the joined
    batch, once it is on the device, to what an objective takes.

    Attributes:
        by_epoch: Whether what is shown depends on the epoch: the loop then asks for `data[epoch, index]`, in whichever
            process reads it.
    """

    by_epoch: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as objectives take it, in a dict of its own.

        `pixel_values` are float32 in [-1, 1], augmented by draws from the global generator of the batch's device;
        `masks` `(B, H, W)` int64 and `points` `(B, P, 2)` with `visible` `(B, P)` go with them.
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


def augmented(batch: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """A batch of uint8 `pixel_values`, masks and points as objectives take it, moved by a configuration's draws."""
    pixels = to_unit(batch["pixel_values"])
    how = (config.random_flip, config.random_rotation, config.random_shift, config.random_scale)
    moves = Moves.draw(len(pixels), pixels.device, *how)
    moved = move_annotations(batch, moves, (pixels.shape[-2], pixels.shape[-1]), config.ignore_index)
    return {**batch, "pixel_values": moves.images(pixels), **moved}


def geometry(config: DataConfig, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """How images become pixels, as JSON."""
    return {"channels": channels, "size": list(size), "center_crop": config.center_crop}


def spread_rows(count: int, most: int = 64) -> list[int]:
    """Some of `count` rows, spread evenly, the first and the last among them: those that enter a fingerprint.

    Example:
        >>> spread_rows(3), spread_rows(10, most=4)
        ([0, 1, 2], [0, 3, 6, 9])
    """
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()


def hashed(parts: Any) -> str:
    """A short hash of byte strings, told apart by their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
