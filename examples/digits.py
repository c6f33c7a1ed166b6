"""The 8x8 digits that scikit-learn ships, as a `datasets.DatasetDict` in three fixed splits.

`python examples/digits.py DIR` writes `train.parquet`, `validation.parquet` and `test.parquet` into DIR, so that
`datasets.load_dataset(DIR)` gives the same three splits back.
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

SPLIT_SIZES = {"train": 997, "validation": 300, "test": 500}
SPLIT_SEED = 0
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def load_digits_splits() -> DatasetDict:
    """scikit-learn's 1,797 digits (8x8, 17 grey levels) with columns `image` (mode "L") and `label`.

    The splits `train` (997), `validation` (300) and `test` (500) are disjoint, stratified and the same everywhere.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8)  # 0..16 => 0..255
    labels = source.target.tolist()
    return DatasetDict({name: _select(pixels, labels, members) for name, members in split_indices(labels).items()})


def digits_split(split: str) -> Dataset:
    """One of the splits.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"The digits have no split {split!r}, only {list(SPLIT_SIZES)}; see --dataset_split.")
    return load_digits_splits()[split]


def split_indices(labels: list[int]) -> dict[str, list[int]]:
    """Indices of each split, decided by hashes alone, so by no library's random stream.

    Each class is put in the order of its hashes and spread evenly over [0, 1]; the test split takes the first 500
    places of that line, validation the next 300 and train the rest: every split has each class to within one image
    of its share.
    """
    if len(labels) != sum(SPLIT_SIZES.values()):
        raise ValueError(f"Got {len(labels)} labels; the splits are fixed for {sum(SPLIT_SIZES.values())} digits.")
    shuffled = sorted(range(len(labels)), key=_hash)
    seen, totals = Counter(), Counter(labels)
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


def write_parquet(folder: str | Path) -> None:
    """Write one Parquet file a split into `folder`, in the layout `datasets.load_dataset(folder)` reads."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder to write the three splits into.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in load_digits_splits().items():
        split.to_parquet(folder / f"{name}.parquet")


def _hash(index: int) -> bytes:
    return hashlib.sha256(f"digits:{SPLIT_SEED}:{index}".encode()).digest()


def _select(pixels: np.ndarray, labels: list[int], members: list[int]) -> Dataset:
    columns = {"image": [PILImage.fromarray(pixels[i]) for i in members], "label": [labels[i] for i in members]}
    return Dataset.from_dict(columns, features=FEATURES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where train.parquet, validation.parquet and test.parquet go")
    write_parquet(parser.parse_args().folder)
