"""The digits beside what `datasets` loads."""

import datasets
from digits import SPLIT_SIZES, load_digits_splits

from diffusers_repr.training.images import ImagePixels
from diffusers_repr.training.order import batch_indices
from diffusers_repr.training.transforms import augment

__all__ = ["ImagePixels", "augment", "batch_indices", "load_split"]


def load_split(name: str, split: str) -> datasets.Dataset:
    """A split of `digits` (scikit-learn's) or of a path or Hub id that `datasets` loads."""
    if name != "digits":
        return datasets.load_dataset(name, split=split)
    if split not in SPLIT_SIZES:
        raise ValueError(f"The digits have no split {split!r}, only {list(SPLIT_SIZES)}; see --dataset_split.")
    return load_digits_splits()[split]
