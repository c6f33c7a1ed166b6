"""Small data sets of generated images for the tests of training data."""

from functools import lru_cache

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features
from PIL import Image

NAMES = ["cat", "dog", "emu"]


@lru_cache
def picture(seed, size=(12, 16), mode="RGB"):
    """Random but smooth, size (H, W): crops and filters show."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)


@lru_cache
def rows(count=11, sizes=((12, 16),), labels=True, captions=False):
    features = {"image": datasets.Image()}
    columns = {"image": [picture(i, sizes[i % len(sizes)]) for i in range(count)]}
    if labels:
        features["label"] = ClassLabel(names=NAMES)
        columns["label"] = [i % 3 for i in range(count)]
    if captions:
        features["text"] = datasets.Value("string")
        columns["text"] = [f"picture {i}" for i in range(count)]
    return Dataset.from_dict(columns, features=Features(features))


def with_broken(data, broken):
    """The data with the image files of some rows cut short, and that of the first of them without an end."""
    raw = data.cast_column("image", datasets.Image(decode=False))
    kept = [dict(row) for row in raw]
    for place in broken:
        kept[place]["image"] = {"bytes": kept[place]["image"]["bytes"][:40], "path": f"photo{place}.png"}
    return Dataset.from_list(kept, features=data.features)
