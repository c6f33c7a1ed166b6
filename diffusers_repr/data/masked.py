"""Images with masks of their pixels, read when asked for: the form that segmentation takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from diffusers_repr.data.image_data import ImageData, from_dataset
from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.data.masks import IGNORE_INDEX, MaskColumn
from diffusers_repr.data.placement import Placement

_NAMES = ("mask", "masks", "segmentation", "annotation", "label_mask")  # columns that are taken for masks


@dataclass(frozen=True)
class Masked(ImageRows):
    """Images with their masks.

    Attributes:
        images: `ImageData` with a column of masks, or a sequence of images.
        name: Of the data set.
        split: Of the data set.
        masks: Where `images` is a sequence: as many masks, PIL images or arrays `(H, W)`.
        column: What classes the masks may have, and which pixels have none.
    """

    split: str
    masks: Any
    column: MaskColumn

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    @property
    def label_names(self) -> list[str] | None:
        """Name of each class id, if known."""
        return self.column.names

    @property
    def ignore_index(self) -> int | None:
        """Id of pixels of no class; None: there are none."""
        return self.column.ignore_index

    def samples(self, rows: Sequence[int]) -> tuple[list[Any], list[np.ndarray]]:
        """The images of these rows, and their masks `(H, W)` int32 at the images' own sizes.

        Raises:
            ValueError: If a mask has another size than its image, or ids that are no classes; names the row.
        """
        if isinstance(self.images, ImageData):
            found = self.images.samples(rows)
            masks = [sample.mask for sample in found]
            return [sample.image for sample in found], [mask for mask in masks if mask is not None]
        images = list(self.read(rows))
        pairs = zip(rows, images, strict=True)
        return images, [self.column.read(self._mask(row), f"Mask {row}", image_size(one)) for row, one in pairs]

    def _mask(self, row: int) -> Any:
        mask = self.masks[row]
        if isinstance(mask, Image.Image):
            return MaskColumn(datasets.Image(), None, None).read(mask, f"Mask {row}", (mask.height, mask.width))
        return mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask

    def batches(self, size: int) -> Iterator[tuple[Sequence[int], list[Any], list[np.ndarray]]]:
        """`(rows, images, masks)`, `size` images at a time."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield rows, *self.samples(rows)


def image_size(image: Any) -> tuple[int, int]:
    """(H, W) of an image as `to_pixels` takes it: PIL, array `(H, W)` or `(H, W, C)`, tensor `(C, H, W)`."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    return (shape[-2], shape[-1]) if isinstance(image, Tensor) else (shape[0], shape[1])


def placed(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask where its image, stretched to a size, has its pixels: of each the id of the nearest."""
    return Placement.of((mask.shape[0], mask.shape[1]), size, "stretch").mask(mask)


def open_masked(
    data: Any,
    role: str,
    label_names: Sequence[str] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    mask_column: str | None = None,
) -> Masked:
    """Bring images with masks to one form.

    Args:
        data: `ImageData` opened with a `mask_column`; a `datasets.Dataset`; or `(images, masks)`, images as
            `to_pixels` takes them and masks as PIL images or arrays of whole numbers `(H, W)`.
        role: What it is for, and the split where the data does not tell: `train`, `validation`, `test`.
        label_names: Name of each class; those of the data if None.
        ignore_index: Id of pixels of no class, of a `Dataset` or a tuple; `ImageData` has its own.
        mask_column: Of a `datasets.Dataset`; one named `mask` if None.

    Raises:
        TypeError: For anything else.
        ValueError: Without images or masks, with another number of masks, or for a column that is not there.
    """
    if isinstance(data, Masked):
        return data
    if isinstance(data, datasets.Dataset):
        column = mask_column or next((name for name in _NAMES if name in data.features), None)
        if column is None:
            raise ValueError(
                f"{role} has no column named {' or '.join(_NAMES[:2])}; its columns are {list(data.features)}. Pass "
                "mask_column=..."
            )
        name, split = data.info.dataset_name or "dataset", str(data.split or role)
        data = from_dataset(
            data, name=name, split=split, mask_column=column, mask_names=label_names, ignore_index=ignore_index
        )
    if isinstance(data, ImageData):
        if data.masks is None:
            raise ValueError(f"{data.name} was opened without masks; pass mask_column=... to load_images.")
        _check_names(data.masks.names, label_names, role)
        return Masked(data, data.name, data.split, None, data.masks)
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(
            f"{role} must be ImageData or a datasets.Dataset with masks, or a tuple (images, masks); got "
            f"{type(data).__name__}."
        )
    images, masks = ([one] if isinstance(one, Image.Image) else one for one in data)
    if not hasattr(images, "__len__") or not hasattr(masks, "__len__"):
        raise TypeError(
            f"{role}: images and masks must be sequences; got {type(images).__name__} and {type(masks).__name__}."
        )
    if len(images) != len(masks):
        raise ValueError(f"{role} has {len(images)} images and {len(masks)} masks; there must be one per image.")
    if not len(images):
        raise ValueError(f"{role} has no images.")
    return Masked(images, "images", role, masks, MaskColumn(None, label_names, ignore_index))


def _check_names(own: Sequence[str] | None, given: Sequence[str] | None, role: str) -> None:
    if own is not None and given is not None and list(own) != list(given):
        raise ValueError(
            f"{role} has the classes {list(own)}; given are {list(given)}. Bring them to the same names in the same "
            "order."
        )


__all__ = ["Masked", "image_size", "open_masked", "placed"]
