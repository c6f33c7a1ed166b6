"""The 8x8 digits that scikit-learn ships, in three fixed splits: the data set `digits` of commands and recipes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from PIL import Image as PILImage

DIGITS = "digits"
SPLIT_SIZES = {"train": 997, "validation": 300, "test": 500}
SPLIT_SEED = 0
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
MASK_NAMES = ("paper", *map(str, range(10)))  # of pixels
_INK = 128  # grey level from which a pixel is the digit's


def load_digits_splits() -> DatasetDict:
    """scikit-learn's 1,797 digits (8x8, 17 grey levels) with columns `image` (mode "L") and `label`.

    The splits `train` (997), `validation` (300) and `test` (500) are disjoint, stratified and the same everywhere.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8)  # 0..16 => 0..255
    labels = source.target.tolist()
    return DatasetDict({name: _select(pixels, labels, members) for name, members in split_indices(labels).items()})


def load_digit_masks(split: str, count: int | None = None) -> Dataset:
    """A split with a column `mask` beside `image` and `label`: 0 for paper, 1 + digit where there is ink.

    Args:
        split: `train`, `validation` or `test`.
        count: Of the first digits; all if None.

    Raises:
        ValueError: For another split, and more digits than there are.
    """
    if split not in SPLIT_SIZES or not 1 <= (count or 1) <= SPLIT_SIZES[split]:
        raise ValueError(f"The digits' splits are {SPLIT_SIZES}; got {split!r}, {count} of it.")
    rows = load_digits_splits()[split].select(range(SPLIT_SIZES[split] if count is None else count))
    inks = (np.array(image) >= _INK for image in rows["image"])
    masks = [PILImage.fromarray(ink * np.uint8(1 + label)) for ink, label in zip(inks, rows["label"], strict=True)]
    columns = {"image": rows["image"][:], "label": rows["label"][:], "mask": masks}
    info = DatasetInfo(features=Features({**FEATURES, "mask": Image()}), dataset_name=DIGITS)
    return Dataset.from_dict(columns, info=info)


def split_indices(labels: Sequence[int]) -> dict[str, list[int]]:
    """Indices of each split, decided by hashes alone, so by no library's random stream.

    Each class is put in the order of its hashes and spread evenly over [0, 1]; the test split takes the first 500
    places of that line, validation the next 300 and train the rest: every split has each class to within one image
    of its share.

    Args:
        labels: Class of each of the 1,797 digits.

    Raises:
        ValueError: For another number of labels.
    """
    if len(labels) != sum(SPLIT_SIZES.values()):
        raise ValueError(f"Got {len(labels)} labels; the splits are fixed for {sum(SPLIT_SIZES.values())} digits.")
    shuffled = sorted(range(len(labels)), key=_hash)
    totals = Counter(labels)
    seen: Counter[int] = Counter()
    place = {}
    for index in shuffled:
        label = labels[index]
        place[index] = (seen[label] + 0.5) / totals[label]
        seen[label] += 1
    line = sorted(shuffled, key=lambda index: (place[index], labels[index]))

    splits, start = {}, 0
    for name in ("test", "validation", "train"):
        members = line[start : start + SPLIT_SIZES[name]]
        splits[name] = sorted(members, key=_hash)  # a split's own order says nothing about the class
        start += SPLIT_SIZES[name]
    return {name: splits[name] for name in SPLIT_SIZES}


def _hash(index: int) -> bytes:
    return hashlib.sha256(f"digits:{SPLIT_SEED}:{index}".encode()).digest()


def _select(pixels: np.ndarray, labels: Sequence[int], members: Sequence[int]) -> Dataset:
    columns = {"image": [PILImage.fromarray(pixels[i]) for i in members], "label": [labels[i] for i in members]}
    return Dataset.from_dict(columns, info=DatasetInfo(features=FEATURES, dataset_name=DIGITS))
