"""Labelled images with further columns that a code may tell: what disentanglement is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusers_repr.data.image_data import ImageData, from_dataset
from diffusers_repr.data.labelled import Labelled
from diffusers_repr.data.splits import open_split


@dataclass(frozen=True)
class AttributedImages(Labelled):
    """Labelled images, and attributes of them.

    Attributes:
        attributes: Name -> `(n,)`: class ids (int64), or numbers (float32).
    """

    attributes: Mapping[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> AttributedImages:
        """These rows, in this order."""
        assert isinstance(self.images, ImageData)
        at = torch.as_tensor(rows)
        kept = {name: values[at] for name, values in self.attributes.items()}
        return replace(self, images=self.images.select(rows), targets=self.targets[at], attributes=kept)


def load_attributed(
    path: str,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    attributes: Sequence[str] = (),
) -> AttributedImages:
    """Open a split of labelled images with columns of attributes.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        image_column: As in `load_images`.
        label_column: Likewise.
        attributes: Columns of whole numbers or classes, true and false, or numbers.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: For a column that is not there, holds something else, or lacks values.
    """
    rows = open_split(path, split)
    images = from_dataset(rows, image_column, label_column, path, split)
    found = {}
    for name in attributes:
        if name not in rows.column_names:
            raise ValueError(f"attributes: {path} has no column {name!r}; it has {', '.join(rows.column_names)}.")
        values = rows.with_format(None)[name][:]
        if not all(isinstance(value, (bool, int, float)) for value in values):
            wrong = next(value for value in values if not isinstance(value, (bool, int, float)))
            raise ValueError(f"attributes: column {name!r} holds {wrong!r}; attributes are class ids or numbers.")
        numbers = any(isinstance(value, float) for value in values)
        found[name] = torch.tensor(values, dtype=torch.float32 if numbers else torch.int64)
    return AttributedImages(images, path, torch.tensor(images.labels()), split, images.label_names, found)


__all__ = ["AttributedImages", "load_attributed"]
