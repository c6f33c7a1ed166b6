"""Images with labels, in the forms that selection and probes take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor

from diffusers_repr.data.image_data import ImageData, from_dataset

Source: TypeAlias = ImageData | datasets.Dataset | tuple[Any, Any]


@dataclass(frozen=True)
class Labelled:
    """Images, read when asked for, with their targets.

    Attributes:
        images: `ImageData`, or a sequence of images.
        targets: Class ids `(n,)`, or numbers `(n,)` or `(n, K)`, on the CPU.
        name: Of the data set.
        split: Of it.
        label_names: Name of each class id, if known.
    """

    images: Any
    targets: Tensor
    name: str
    split: str
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    def batches(self, size: int) -> Iterator[tuple[slice, Any]]:
        """`(rows, images)`, `size` at a time."""
        if isinstance(self.images, ImageData):
            start = 0
            for images, _ in self.images.batches(size):
                yield slice(start, start + len(images)), images
                start += len(images)
            return
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.images[rows]

    def class_ids(self, hint: str = "") -> Tensor:
        """The targets as int64.

        Args:
            hint: What else the error is to say.

        Raises:
            ValueError: If they are not one whole number an image.
        """
        targets = self.targets
        if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim != 1:
            raise ValueError(
                f"{self} must have one whole-number class id per image; got {targets.dtype} labels of shape "
                f"{tuple(targets.shape)}. {hint}".rstrip()
            )
        return targets.long()


def open_labelled(data: Any, role: str) -> Labelled:
    """Bring labelled images to one form.

    Args:
        data: A `Source`: `ImageData`, a `datasets.Dataset` with an image and a label column, or `(images, labels)`
            with images as `to_pixels` takes them.
        role: What it is for, and the split where the data does not tell: `train`, `validation`, `test`.

    Raises:
        TypeError: For anything else.
        ValueError: Without images or labels, with another number of labels, or labels that are no numbers.
    """
    if isinstance(data, datasets.Dataset):
        data = from_dataset(data, name=data.info.dataset_name or "dataset", split=str(data.split or role))
    if isinstance(data, ImageData):
        return Labelled(data, torch.tensor(data.labels()), data.name, data.split, data.label_names)
    if isinstance(data, dict):
        raise TypeError(
            f"{role} is a dictionary of splits ({', '.join(map(str, data))}); pass one split, e.g. data['{role}']."
        )
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(
            f"{role} must be ImageData, a datasets.Dataset or a tuple (images, labels); got {type(data).__name__}."
        )
    images, labels = data
    if hasattr(images, "__iter__") and not hasattr(images, "__getitem__"):
        images = list(images)
    if not hasattr(images, "__len__") or not hasattr(labels, "__len__"):
        raise TypeError(
            f"{role}: images and labels must be sequences; got {type(images).__name__} and {type(labels).__name__}."
        )
    if len(images) != len(labels):
        raise ValueError(f"{role} has {len(images)} images and {len(labels)} labels; there must be one per image.")
    if not len(images):
        raise ValueError(f"{role} has no images.")
    try:
        targets = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The labels of {role} are no numbers, or some are missing: {error}.") from error
    return Labelled(images, targets, "images", role)


__all__ = ["Labelled", "Source", "open_labelled"]
