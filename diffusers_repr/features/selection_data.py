"""What selection reads: a train and a validation split with targets, and never a test split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor

from diffusers_repr.features.data import ImageData, from_dataset

CLASS_METRICS = ("accuracy", "balanced_accuracy", "neg_brier")
VALUE_METRICS = ("r2", "neg_mse")
METRICS = CLASS_METRICS + VALUE_METRICS

Source: TypeAlias = ImageData | datasets.Dataset | tuple[Any, Any]


@dataclass(frozen=True)
class Labelled:
    """Images, read when asked for, with their targets.

    Attributes:
        source: `ImageData`, or a sequence of images.
        targets: Class indices `(n,)` int64, or values `(n, K)` float64.
        name: For messages and the recipe.
    """

    source: Any
    targets: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int) -> Iterator[tuple[slice, Any]]:
        """`(rows, images)`, `size` at a time."""
        if isinstance(self.source, ImageData):
            start = 0
            for images, _ in self.source.batches(size):
                yield slice(start, start + len(images)), images
                start += len(images)
            return
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.source[rows]

    def side(self, classes: int | None) -> Tensor:
        """Targets of a linear fit `(n, K)` float64: one-hot of `classes`, or the values."""
        if classes is None:
            return self.targets
        return torch.nn.functional.one_hot(self.targets, classes).double()


@dataclass(frozen=True)
class Task:
    """A train and a validation split of one task.

    Attributes:
        train: Rows to fit on.
        validation: Rows to score on.
        classes: Class ids in ascending order; None for values.
        metric: One of `METRICS`; larger is better.
    """

    train: Labelled
    validation: Labelled
    classes: tuple[int, ...] | None
    metric: str

    @property
    def columns(self) -> int:
        """Columns of the targets of a linear fit."""
        return int(self.train.targets.shape[1]) if self.classes is None else len(self.classes)


def make_task(train: Source, validation: Source, metric: str) -> Task:
    """Check both splits and bring them to one form.

    Raises:
        ValueError: Unknown metric, a test split, equal splits, missing or unusable labels, too few rows.
        TypeError: For anything that is no split of labelled images.
    """
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}; expected one of {', '.join(METRICS)}.")
    fit, score = _open(train, "train"), _open(validation, "validation")
    _refuse_same(fit[0], score[0])
    if metric in VALUE_METRICS:
        values = [_values(images, targets, name) for images, targets, name in (fit, score)]
        if values[0].targets.shape[1] != values[1].targets.shape[1]:
            raise ValueError("train and validation have targets of unequal width.")
        if len(values[0]) < 2 or len(values[1]) < 2:
            raise ValueError("Too few rows: train and validation need at least 2 each.")
        if metric == "r2" and bool((values[1].targets == values[1].targets[0]).all(0).any()):
            raise ValueError(
                "r2 is undefined: a validation target has the same value in all rows. Use metric='neg_mse'."
            )
        return Task(values[0], values[1], None, metric)
    return _classes(fit, score, metric)


def _classes(fit: tuple[Any, Any, str], score: tuple[Any, Any, str], metric: str) -> Task:
    ids, held = _ids(fit[1], fit[2], metric), _ids(score[1], score[2], metric)
    classes, counts = ids.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{fit[2]} has the single class {classes.tolist()}; nothing tells features apart. Need 2.")
    if int(counts.min()) < 2:
        rare = classes[counts < 2].tolist()
        raise ValueError(f"Too few rows: classes {rare[:10]} of {fit[2]} have one image; each needs at least 2.")
    if len(held) < 2:
        raise ValueError(f"Too few rows: {score[2]} has {len(held)}; selection needs some dozens.")
    unknown = sorted(set(held.unique().tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(
            f"{score[2]} has classes {unknown[:10]} that {fit[2]} lacks ({classes.tolist()[:10]}...); "
            "check that both use the same label ids."
        )
    parts = [Labelled(x[0], torch.searchsorted(classes, y), x[2]) for x, y in ((fit, ids), (score, held))]
    return Task(parts[0], parts[1], tuple(classes.tolist()), metric)


def _ids(targets: Any, name: str, metric: str) -> Tensor:
    values = _tensor(targets, name)
    if values.is_floating_point() or values.dtype == torch.bool or values.ndim != 1:
        raise ValueError(
            f"metric={metric!r} needs one whole-number class id per image; {name} has {values.dtype} targets of shape "
            f"{tuple(values.shape)}. For numbers use metric='r2'."
        )
    if len(values) and int(values.min()) < 0:
        raise ValueError(f"{name} has {int((values < 0).sum())} rows with label {int(values.min())}: missing labels.")
    return values.long()


def _values(images: Any, targets: Any, name: str) -> Labelled:
    values = _tensor(targets, name).double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} has NaN or infinite targets.")
    if values.ndim not in (1, 2):
        raise ValueError(f"{name} has targets of shape {tuple(values.shape)}; expected (n,) or (n, K).")
    return Labelled(images, values.reshape(len(values), -1), name)


def _tensor(targets: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(targets).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The labels of {name} are no numbers, or some are missing: {error}.") from error


def _open(data: Any, role: str) -> tuple[Any, Any, str]:
    if isinstance(data, datasets.Dataset):
        data = from_dataset(data, name=role, split=str(data.split) if data.split is not None else role)
    if isinstance(data, ImageData):
        refuse_test(data.split)
        if data.label_column is None:
            raise ValueError(
                f"{data.name} (split {data.split!r}) has no label column; columns are {data.dataset.column_names}. "
                "Pass ImageData with label_column=, or (images, labels)."
            )
        return data, data.labels(), f"{data.name} ({data.split})"
    if isinstance(data, dict):
        raise TypeError(
            f"{role} is a dictionary of splits ({', '.join(map(str, data))}); pass one split, e.g. data['{role}']."
        )
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(
            f"{role} must be ImageData, a datasets.Dataset or (images, labels); got {type(data).__name__}."
        )
    images, labels = data
    if not hasattr(images, "__len__") or not hasattr(labels, "__len__"):
        raise TypeError(
            f"{role}: images and labels must be sequences; got {type(images).__name__} and {type(labels).__name__}."
        )
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{role} has {len(images)} images and {len(labels)} labels; they must be equal and not 0.")
    return images, labels, role


def refuse_test(split: str) -> None:
    """Raise ValueError for a split of test data: what is chosen on it can no longer be measured on it."""
    for part in re.split(r"\s*\+\s*", str(split).lower()):
        if re.fullmatch(r"(.*[_.-])?test(ing)?([_.-].*)?", part.split("[")[0].strip()):
            raise ValueError(
                f"Split {split!r} is test data; selection reads a train and a validation split only. Keep the test "
                "split for the final score; without a validation split, hold out a part of train (`hold_out`)."
            )


def _refuse_same(train: Any, validation: Any) -> None:
    def key(source: Any) -> Any:
        return source.dataset._fingerprint if isinstance(source, ImageData) else id(source)

    if key(train) == key(validation):
        raise ValueError("train and validation are the same rows; scores would be those of the fit. See `hold_out`.")


def hold_out(data: ImageData, fraction: float = 0.2, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Split a part off train, to validate on, for data sets without a validation split.

    Rows are put in the order of a hash of (seed, position), so the same on every machine; each class gives its share.

    Args:
        data: A train split.
        fraction: Part of the rows to hold out, between 0 and 1.
        seed: Of the hash.

    Returns:
        `(train, validation)`.

    Raises:
        ValueError: For a fraction outside (0, 1), a test split, or if one part would be empty.
    """
    refuse_test(data.split)
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1; got {fraction!r}.")
    labels = data.labels() if data.label_column is not None else [0] * len(data)
    order = sorted(range(len(labels)), key=lambda row: hashlib.blake2b(f"{seed}:{row}".encode()).digest())
    order = _spread(order, labels)
    count = round(fraction * len(order))
    if not 0 < count < len(order):
        raise ValueError(f"A fraction {fraction} of {len(order)} rows leaves one part empty.")
    held = data.select(sorted(order[:count]))
    return data.select(sorted(order[count:])), replace(held, split=f"{data.split}, held out")


def _spread(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """`order` rearranged so that every class is spread evenly over it."""
    totals: dict[int, int] = {}
    for label in labels:
        totals[label] = totals.get(label, 0) + 1
    seen: dict[int, int] = {}
    place = {}
    for row in order:
        seen[labels[row]] = seen.get(labels[row], 0) + 1
        place[row] = (seen[labels[row]] - 0.5) / totals[labels[row]]
    return sorted(order, key=lambda row: place[row])  # stable: equal places keep the hash order


__all__ = ["METRICS", "Labelled", "Task", "hold_out", "make_task", "refuse_test"]
