"""Images, read when asked for, with or without targets: the forms that measures, selection and probes take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor

from diffusers_repr.data.image_data import ImageData, from_dataset
from diffusers_repr.data.label_column import check_ids
from diffusers_repr.denoiser.images import to_pixels


@dataclass(frozen=True)
class ImageRows:
    """Images of a data set, a few at a time, by their places.

    Attributes:
        images: `ImageData` or a sequence of images (a tensor too).
        name: What it is called in records.
    """

    images: Any
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return self.name

    def read(self, rows: Sequence[int]) -> Any:
        """The images at these places."""
        if isinstance(self.images, ImageData):
            return self.images.read(rows)
        if isinstance(self.images, Tensor):
            return self.images[torch.as_tensor(rows)]
        return [self.images[row] for row in rows]

    def pixels(
        self,
        size: int,
        channels: int,
        image_size: int | tuple[int, int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """`(rows, pixels)`, `size` images at a time, as `to_pixels` gives them.

        Args:
            size: Images a batch.
            channels: Of the pixels.
            image_size: Resize to (H, W) or a square.
            rows: Which images; all if None.

        Raises:
            ValueError: If an image has another size than those before it; as `to_pixels`.
        """
        rows, before = range(len(self)) if rows is None else rows, None
        for start in range(0, len(rows), size):
            places = rows[start : start + size]
            pixels = to_pixels(self.read(places), channels, image_size, places)
            found = tuple(pixels.shape[2:])
            if before not in (None, found):
                raise ValueError(
                    f"Image {places[0]} of {self} is {found} (H, W), those before it are {before}; pass "
                    "image_size=(H, W) to resize them."
                )
            before = found
            yield places, pixels


@dataclass(frozen=True)
class Labelled(ImageRows):
    """Images with their targets.

    Attributes:
        images: `ImageData`, or a sequence of images.
        name: Of the data set.
        targets: Class ids `(n,)`, or numbers `(n,)` or `(n, K)`, on the CPU.
        split: Of the data set.
        label_names: Name of each class id, if known.
    """

    targets: Tensor
    split: str
    label_names: list[str] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    def batches(self, size: int) -> Iterator[tuple[slice, Any]]:
        """`(rows, images)`, `size` at a time."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.read(range(rows.start, rows.stop))

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

    def check_classes(self) -> None:
        """Refuse class ids to learn from that are as `check_ids` refuses them, where the classes have no names."""
        if not self.label_names:
            check_ids(self.class_ids().numpy(), f"The labels of {self}")


LabelledSource: TypeAlias = Labelled | ImageData | datasets.Dataset | tuple[Any, Any]


def open_images(data: Any, role: str) -> ImageRows:
    """Bring images to one form.

    Args:
        data: `ImageRows`, which is given back; `ImageData`; a `datasets.Dataset` with a column of images; or a
            sequence of images as `to_pixels` takes them: a list, an array or a tensor `(N, C, H, W)`.
        role: What it is for, for errors and names.

    Raises:
        TypeError: For anything else.
        ValueError: Without images.
    """
    if isinstance(data, ImageRows):
        return data
    data = _opened(data, role)
    sequence = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, dict))
    if not (sequence or isinstance(data, ImageData)):
        raise TypeError(
            f"{role} must be ImageData, a datasets.Dataset, or a list, array or tensor of images; got {_got(data)}."
        )
    if not len(data):
        raise ValueError(f"{role} has no images.")
    return ImageRows(data, f"{data.name} ({data.split})" if isinstance(data, ImageData) else role)


def open_labelled(data: Any, role: str) -> Labelled:
    """Bring labelled images to one form.

    Args:
        data: A `LabelledSource`: `Labelled`, which is given back; `ImageData`; a `datasets.Dataset` with an image and
            a label column; or `(images, labels)` with images as `to_pixels` takes them.
        role: What it is for, and the split where the data does not tell: `train`, `validation`, `test`.

    Raises:
        TypeError: For anything else.
        ValueError: Without images or labels, with another number of labels, or labels that are no numbers.
    """
    data = _opened(data, role)
    if isinstance(data, Labelled):
        return data
    if isinstance(data, ImageData):
        return Labelled(data, data.name, torch.tensor(data.labels()), data.split, data.label_names)
    if isinstance(data, dict):
        raise TypeError(
            f"{role} is a dictionary of splits ({', '.join(map(str, data))}); pass one split, e.g. data['{role}']."
        )
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(f"{role} must be ImageData, a datasets.Dataset or a tuple (images, labels); got {_got(data)}.")
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
        raise ValueError(
            f"The labels of {role} are no numbers, or some are missing: {error}. Class ids are whole numbers from 0: "
            "`numpy.unique(labels, return_inverse=True)` gives the names and the ids of texts."
        ) from error
    return Labelled(images, "images", targets, role)


def _got(data: Any) -> str:
    """What came, and of a place how to open it."""
    if isinstance(data, (str, os.PathLike)):
        return f"the text {os.fspath(data)!r}; load_images({os.fspath(data)!r}) of diffusers_repr.data opens it"
    return type(data).__name__


def _opened(data: Any, role: str) -> Any:
    if isinstance(data, datasets.Dataset):
        return from_dataset(data, name=data.info.dataset_name or "dataset", split=str(data.split or role))
    return data


__all__ = ["ImageRows", "Labelled", "LabelledSource", "open_images", "open_labelled"]
