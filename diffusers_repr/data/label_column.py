"""The class ids of a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np

from diffusers_repr.hub.schema import MAX_ITEMS

MissingLabels = Literal["error", "keep"]


@dataclass(frozen=True)
class ClassLabels:
    """Class ids of a data set.

    Attributes:
        ids: `(N,)` int64; -1 where a row has none.
        names: Name of each class id.
    """

    ids: np.ndarray
    names: list[str]


def class_names(feature: Any, largest: int = -1) -> list[str]:
    """Names of the classes of a column: those of a `ClassLabel`, else the numbers up to the largest id."""
    names = getattr(feature, "names", None)
    return list(names) if names else [str(number) for number in range(largest + 1)]


def read_labels(data: datasets.Dataset, column: str, missing: MissingLabels) -> ClassLabels:
    """The class ids of a column of whole numbers, without reading any image.

    Args:
        data: Map-style data set.
        column: `ClassLabel` or whole numbers.
        missing: Rows without a class (null or -1): `error`, or `keep`: their id is -1.

    Raises:
        ValueError: If rows have no class and `missing` is `error`, or an id is beyond the classes or a million, or
            below -1.
    """
    table = data.select_columns([column]).with_format("arrow")[:]
    ids = table.column(0).fill_null(-1).to_numpy().astype(np.int64)
    gone = np.flatnonzero(ids == -1)
    if len(gone) and missing == "error":
        raise ValueError(
            f"{len(gone)} of {len(ids)} images have no class in {column!r}, the first is row {gone[0]}; leave them "
            "out, pass --missing_labels keep for an objective that learns from them too, or --label_column none to "
            "train without labels."
        )
    largest = int(ids.max(initial=-1))
    if largest >= MAX_ITEMS:
        raise ValueError(
            f"Row {int(ids.argmax())} has the class {largest} in {column!r}; classes are numbered from 0 to at most "
            f"{MAX_ITEMS - 1}. `dataset.class_encode_column({column!r})` numbers what there is."
        )
    names = class_names(data.features[column], largest)
    wrong = np.flatnonzero((ids < -1) | (ids >= len(names)))
    if len(wrong):
        raise ValueError(
            f"Row {wrong[0]} has the class {ids[wrong[0]]} in {column!r}, which has {len(names)} classes "
            f"(0 to {len(names) - 1})."
        )
    return ClassLabels(ids, names)
