"""Labelled images in the forms a probe takes, and their features as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.data import ImageData, from_dataset


@dataclass(frozen=True)
class LabelledImages:
    """Images, read when asked for, with class ids.

    Attributes:
        images: `ImageData`, or a sequence of images.
        labels: `(N,)` class ids.
        label_names: Name of each class id, if known.
        name: Of the data set.
        split: Of it.
    """

    images: Any
    labels: Tensor
    label_names: list[str] | None
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Any]:
        """Images, `size` at a time."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            if isinstance(self.images, ImageData):
                yield list(self.images.dataset[rows][self.images.image_column])
            else:
                yield self.images[rows]


def labelled_images(data: Any, what: str = "train") -> LabelledImages:
    """Bring labelled images to one form.

    Args:
        data: `ImageData`, a `datasets.Dataset` with an image and a label column, or `(images, labels)` with images as
            `to_pixels` takes them and class ids from 0.
        what: Split to write where the data does not tell.

    Raises:
        TypeError: For anything else.
        ValueError: Without labels, or with another number of them than of images.
    """
    if isinstance(data, LabelledImages):
        return data
    if isinstance(data, datasets.Dataset):
        data = from_dataset(data, name=data.info.dataset_name or "dataset", split=str(data.split or what))
    if isinstance(data, ImageData):
        return LabelledImages(data, torch.tensor(data.labels()), data.label_names, data.name, data.split)
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(
            f"The {what} data must be ImageData, a datasets.Dataset or a tuple (images, labels); got "
            f"{type(data).__name__}."
        )
    images, labels = data[0], torch.as_tensor(data[1])
    if not labels.numel():
        raise ValueError(f"The {what} data has no images.")
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(
            f"The {what} labels must be class ids in one dimension; got {tuple(labels.shape)} {labels.dtype}."
        )
    if not isinstance(images, (Sequence, Tensor)) and not hasattr(images, "__getitem__"):
        images = list(images)
    if len(images) != len(labels):
        raise ValueError(f"The {what} data has {len(images)} images and {len(labels)} labels.")
    return LabelledImages(images, labels.long(), None, "images", what)


def join(output: FeatureOutput, layers: Sequence[str]) -> Tensor:
    """Pooled features side by side, `(B, D)` float32: levels in order, within each the layers in order."""
    parts = [one.features[layer].float() for _, one in output.per_level() for layer in layers]
    return torch.cat(parts, dim=1)


def read_features(
    extractor: FeatureExtractor,
    data: LabelledImages,
    batch_size: int,
    prompt: str | None = None,
    class_labels: int | None = None,
    progress_bar: Callable[..., Any] | None = None,
) -> tuple[Tensor, FeatureOutput, tuple[int, int]]:
    """Features of all images, `(N, D)` float32 on the CPU; besides them memory holds one batch.

    Args:
        extractor: With a pooling.
        data: The images.
        batch_size: Images read and encoded at a time.
        prompt: One for all images.
        class_labels: One id for all images.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.

    Returns:
        The features, the last batch's output, and the (H, W) of the images.

    Raises:
        ValueError: If images of several sizes come and the extractor has no `image_size`.
    """
    table: Tensor | None = None
    size, start, bar = extractor.image_size, 0, None if progress_bar is None else progress_bar(total=len(data))
    try:
        for images in data.batches(batch_size):
            pixels = to_pixels(images, extractor.denoiser.image_channels, extractor.image_size)
            found = (pixels.shape[2], pixels.shape[3])
            if size is not None and found != size:
                raise ValueError(
                    f"Image {start} of {data.name} ({data.split}) is {found} (H, W), those before it are {size}; pass "
                    "image_size=(H, W) to resize them."
                )
            size = found
            output = extractor.from_pixels(pixels, prompt=prompt, class_labels=class_labels)
            rows = join(output, extractor.layers).cpu()
            if table is None:
                table = torch.empty(len(data), rows.shape[1])
            table[start : start + len(rows)] = rows
            start += len(rows)
            if bar is not None:
                bar.update(len(rows))
    finally:
        if bar is not None:
            bar.close()
    assert table is not None
    assert size is not None
    return table, output, size
