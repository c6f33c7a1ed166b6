"""The class ids of a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np

from diffusers_repr.hub.schema import MAX_ITEMS

MissingLabels = Literal["error", "keep"]
_DENSE = 1000  # ids up to this may have any gaps


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


def check_ids(ids: np.ndarray, what: str) -> None:
    """Refuse class ids without names that are so far apart that most classes would be empty.

    A classifier has a class for every number from 0 to the largest id. Up to a thousand of them pass, as of a data set
    of which few classes are at hand.

    Args:
        ids: `(N,)` whole numbers; those below 0 are no classes.
        what: Names them in the message: `Column 'label' of pets`.

    Raises:
        ValueError: If the largest id passes `MAX_ITEMS`, or is above 1000 and fewer than a tenth of the ids up to it
            occur.

    Example:
        >>> check_ids(np.array([0, 1, 7]), "The labels")
        >>> check_ids(np.array([0, 5_000]), "The labels")
        Traceback (most recent call last):
        ...
        ValueError: The labels: 2 different class ids from 0 to 5000: 5001 classes, of which 4999 were empty. ...
    """
    largest = int(ids.max(initial=-1))
    if largest <= _DENSE:
        return
    held = len(np.unique(ids[ids >= 0]))
    if largest < MAX_ITEMS and held * 10 > largest:
        return
    raise ValueError(
        f"{what}: {held} different class ids from {int(ids[ids >= 0].min())} to {largest}: {largest + 1} classes, of "
        f"which {largest + 1 - held} were empty. `dataset = dataset.class_encode_column(column)` numbers those that "
        "there are from 0; if all of them are classes, say so by `dataset.cast_column(column, "
        f"datasets.ClassLabel(num_classes=...))`, at most {MAX_ITEMS}."
    )


def read_labels(data: datasets.Dataset, column: str, missing: MissingLabels) -> ClassLabels:
    """The class ids of a column of whole numbers, without reading any image.

    Args:
        data: Map-style data set.
        column: `ClassLabel` or whole numbers.
        missing: Rows without a class (null or -1): `error`, or `keep`: their id is -1.

    Raises:
        ValueError: If rows have no class and `missing` is `error`, or an id is beyond the classes or
            below -1, or no row has a class, or the ids are as `check_ids` refuses them.
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
    if not class_names(data.features[column]):
        check_ids(ids, f"Column {column!r}")
    names = class_names(data.features[column], int(ids.max(initial=-1)))
    if not names and len(gone) == len(ids):
        raise ValueError(
            f"Column {column!r} has no class in any of {len(ids)} rows; pass --label_column none to train without "
            "labels."
        )
    wrong = np.flatnonzero((ids < -1) | (ids >= len(names)))
    if len(wrong):
        raise ValueError(
            f"Row {wrong[0]} has the class {ids[wrong[0]]} in {column!r}, which has {len(names)} classes "
            f"(0 to {len(names) - 1})."
        )
    return ClassLabels(ids, names)
