"""Images of a `datasets` column as batches that start anywhere in a run, and their augmentation."""

import math
from collections.abc import Iterator
from functools import lru_cache

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from digits import SPLIT_SIZES, load_digits_splits
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset


def load_split(name: str, split: str) -> datasets.Dataset:
    """A split of `digits` (scikit-learn's) or of a path or Hub id that `datasets` loads."""
    if name != "digits":
        return datasets.load_dataset(name, split=split)
    if split not in SPLIT_SIZES:
        raise ValueError(f"The digits have no split {split!r}, only {list(SPLIT_SIZES)}; see --dataset_split.")
    return load_digits_splits()[split]


class ImagePixels(Dataset):
    """The images of a column as uint8 CHW tensors of one size: the largest centred crop, scaled."""

    def __init__(
        self, data: datasets.Dataset, column: str, channels: int, size: int | tuple[int, int], cache: bool
    ) -> None:
        if not isinstance(data.features.get(column), datasets.Image):
            found = {name: type(feature).__name__ for name, feature in data.features.items()}
            raise ValueError(f"No column {column!r} of type Image in {found}; choose by --image_column.")
        if len(data) == 0:
            raise ValueError("The split to train on has no image; choose by --dataset_name and --dataset_split.")
        if channels not in (1, 3):
            raise ValueError(f"`model` has in_channels={channels}; images have 1 (grey) or 3 (RGB).")
        self.data, self.column = data, column
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mode = "L" if channels == 1 else "RGB"
        self.cached = [self.decode(index) for index in range(len(data))] if cache else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.decode(index) if self.cached is None else self.cached[index]

    def decode(self, index: int) -> Tensor:
        image = self.data[index][self.column].convert(self.mode)
        height, width = self.size
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1)


class LabelledImages(Dataset):
    """`ImagePixels` with the class ids of a `ClassLabel` column, for a model with one more embedding than classes."""

    def __init__(self, images: ImagePixels, column: str, num_class_embeds: int) -> None:
        feature = images.data.features.get(column)
        if not isinstance(feature, datasets.ClassLabel):
            found = {name: type(feature).__name__ for name, feature in images.data.features.items()}
            raise ValueError(f"No column {column!r} of type ClassLabel in {found}; choose by --label_column.")
        if num_class_embeds != feature.num_classes + 1:
            raise ValueError(
                f"`model` has num_class_embeds={num_class_embeds}; the {feature.num_classes} classes of {column!r} "
                f"and the null id need {feature.num_classes + 1}."
            )
        self.images, self.labels = images, list(images.data[column])
        unknown = sum(label is None or label < 0 for label in self.labels)
        if unknown:
            raise ValueError(f"{unknown} of {len(self.labels)} images have no class in {column!r}; leave them out.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def drop_labels(labels: Tensor, null: int, probability: float) -> Tensor:
    """Each of (B,) labels becomes `null` with this probability, by its own draw (Ho and Salimans 2022, alg. 1)."""
    dropped = torch.rand(len(labels), device=labels.device) < probability
    return torch.where(dropped, null, labels)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def batch_indices(length: int, seed: int, first: int, size: int, stride: int) -> Iterator[list[int]]:
    """Image n of a run is `permutation(seed, epoch)[n mod length]`, so any place is found without a replay.

    Yields the `size` images from `first` on, then those from `first + stride` on, without end.
    """
    while True:
        places = [divmod(n, length) for n in range(first, first + size)]
        yield [int(permutation(seed, epoch, length)[place]) for epoch, place in places]
        first += stride


def augment(images: Tensor, flip: bool, rotation: float, shift: float, scale: float) -> Tensor:
    """Mirror, turn, move and scale each of (B, C, H, W) in [-1, 1] by its own draw; what enters is black.

    `rotation` is in degrees, `shift` and `scale` are shares of the side; each draw is uniform up to them, either way.
    """
    if not (flip or rotation or shift or scale):
        return images
    angle, across, down, zoom, mirror = torch.rand(5, len(images), device=images.device) * 2 - 1
    angle, zoom = angle * math.radians(rotation), 1 + zoom * scale
    mirror = torch.where(mirror < 0, -1.0, 1.0) if flip else torch.ones_like(mirror)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # affine_grid's coordinates span [-1, 1]: a share of the side is twice that share
    rows = [mirror * cos, -sin, 2 * shift * across, mirror * sin, cos, 2 * shift * down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, padding_mode="zeros", align_corners=False) - 1
