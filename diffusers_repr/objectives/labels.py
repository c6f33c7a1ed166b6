"""`check_class_labels`: what methods that learn classes ask of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_class_labels(batch: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """There must be labels, of the classes there are.

    Args:
        batch: Still on the CPU.
        class_names: Of the classes.

    Raises:
        ValueError: If not.
    """
    labels = batch.get("class_labels")
    if labels is None:
        raise ValueError("The data have no class labels; name a column of them by --label_column.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(class_names):
        raise ValueError(
            f"Labels run from {low} to {high}; class ids run from 0 to {len(class_names) - 1}."
            + (" -1 is a row without a class: leave such rows out." if low < 0 else "")
        )


__all__ = ["check_class_labels"]
