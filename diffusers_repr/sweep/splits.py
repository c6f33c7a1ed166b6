"""What selection reads: a train and a validation split with targets, and never a test split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.data.labelled import Labelled, open_labelled
from diffusers_repr.sweep.linear import VALUE_METRICS, LinearSums
from diffusers_repr.sweep.measure import Measure, Split


def open_splits(train: Any, validation: Any, measure: Measure) -> tuple[dict[str, Split], list[int] | None]:
    """Check both splits and bring them to the form that measures take.

    Returns:
        `train` and `held`, with class ids as indices into the second value, the class ids in ascending order; or, and
        then it is None, with values `(n, K)` float64, or whatever targets there are.

    Raises:
        ValueError: A test split, equal splits, missing or unusable labels, too few rows.
        TypeError: For anything that is no split of labelled images.
    """
    fit, held = open_labelled(train, "train"), open_labelled(validation, "validation")
    for found in (fit, held):
        if isinstance(found.images, ImageData):
            refuse_test(found.split)
    _refuse_same(fit.images, held.images)
    classes = None
    if measure.name in VALUE_METRICS:
        fit, held = _values(fit, held, measure.name)
    elif measure.needs_labels or isinstance(measure, LinearSums):
        fit, held, classes = _classes(fit, held, measure.name)
    splits = {
        role: Split(data, range(len(data)), str(data), data.targets) for role, data in (("train", fit), ("held", held))
    }
    return splits, classes


def _values(fit: Labelled, score: Labelled, metric: str) -> tuple[Labelled, Labelled]:
    train, held = _as_values(fit), _as_values(score)
    if train.targets.shape[1] != held.targets.shape[1]:
        raise ValueError("train and validation have targets of unequal width.")
    if len(train) < 2 or len(held) < 2:
        raise ValueError("Too few rows: train and validation need at least 2 each.")
    if metric == "r2" and bool((held.targets == held.targets[0]).all(0).any()):
        raise ValueError("r2 is undefined: a validation target has the same value in all rows. Use metric='neg_mse'.")
    return train, held


def _as_values(data: Labelled) -> Labelled:
    values = data.targets.double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{data} has NaN or infinite targets.")
    if values.ndim not in (1, 2):
        raise ValueError(f"{data} has targets of shape {tuple(values.shape)}; expected (n,) or (n, K).")
    return replace(data, targets=values.reshape(len(values), -1))


def _classes(fit: Labelled, score: Labelled, metric: str) -> tuple[Labelled, Labelled, list[int]]:
    ids, held = _ids(fit, metric), _ids(score, metric)
    fit.check_classes()
    classes, counts = ids.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{fit} has the single class {classes.tolist()}; nothing tells features apart. Need 2.")
    if int(counts.min()) < 2:
        rare = classes[counts < 2].tolist()
        raise ValueError(f"Too few rows: classes {rare[:10]} of {fit} have one image; each needs at least 2.")
    if len(held) < 2:
        raise ValueError(f"Too few rows: {score} has {len(held)}; selection needs some dozens.")
    unknown = sorted(set(held.unique().tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(
            f"{score} has classes {unknown[:10]} that {fit} lacks ({classes.tolist()[:10]}...); "
            "check that both use the same label ids."
        )
    refuse_one_class(held, str(score))
    parts = [replace(data, targets=torch.searchsorted(classes, y)) for data, y in ((fit, ids), (score, held))]
    return parts[0], parts[1], classes.tolist()


def _ids(data: Labelled, metric: str) -> Tensor:
    ids = data.class_ids(f"metric={metric!r} compares classes; for numbers use metric='r2'.")
    if int(ids.min()) < 0:
        raise ValueError(f"{data} has {int((ids < 0).sum())} rows with label {int(ids.min())}: missing labels.")
    return ids


def refuse_one_class(ids: Tensor, name: str) -> None:
    """Raise ValueError for labels to score on that are all the same: every feature that guesses it would be best."""
    if len(ids.unique()) < 2:
        raise ValueError(
            f"All {len(ids)} images of {name} are of class {int(ids[0])}; a score on one class tells nothing apart. "
            "Give images of at least two."
        )


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
    """Split a part off train, to validate or to test on, for data sets without such a split.

    Rows are put in the order of a hash of (seed, position), so the same on every machine; each class gives its share.
    The names of both parts tell how they were made, and so do recipes and cards.

    Args:
        data: A train split.
        fraction: Part of the rows to hold out, between 0 and 1.
        seed: Of the hash.

    Returns:
        `(train, held out)`.

    Raises:
        ValueError: For a fraction outside (0, 1), a test split, or if one part would be empty.
    """
    refuse_test(data.split)
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction to hold out must lie between 0 and 1; got {fraction!r}.")
    order = _drawn(data, seed)
    count = round(fraction * len(order))
    if not 0 < count < len(order):
        raise ValueError(f"A fraction {fraction} of {len(order)} rows leaves one part empty.")
    part = f"{fraction:g} held out by seed {seed}"
    return (
        replace(data.select(sorted(order[count:])), split=f"{data.split} without {part}"),
        replace(data.select(sorted(order[:count])), split=f"{data.split}, {part}"),
    )


def draw_rows(data: ImageData, count: int, seed: int = 0) -> ImageData:
    """A few rows, in their order, of each class its share; all if there are no more.

    Args:
        data: Any split.
        count: Of rows.
        seed: As in `hold_out`.

    Raises:
        ValueError: For a count below 1.
    """
    if count < 1:
        raise ValueError(f"The number of rows must be at least 1; got {count}.")
    if count >= len(data):
        return data
    drawn = data.select(drawn_rows(data, count, seed))
    return replace(drawn, split=f"{data.split}, {count} drawn by seed {seed}")


def drawn_rows(data: ImageData, count: int, seed: int = 0) -> list[int]:
    """The places of the rows that `draw_rows` takes, in order.

    Args:
        data: Any split.
        count: Of rows.
        seed: As in `hold_out`.
    """
    return sorted(_drawn(data, seed)[:count])


def _drawn(data: ImageData, seed: int) -> list[int]:
    """All rows in the order in which `hold_out` takes them."""
    labels = data.labels() if data.label_column is not None else [0] * len(data)
    return _spread(
        sorted(range(len(labels)), key=lambda row: hashlib.blake2b(f"{seed}:{row}".encode()).digest()), labels
    )


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
