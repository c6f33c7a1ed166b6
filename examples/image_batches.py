"""The digits beside what `datasets` loads, and images with labels for a model with a null id."""

import datasets
from digits import SPLIT_SIZES, load_digits_splits
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_repr.training.images import ImagePixels
from diffusers_repr.training.order import batch_indices, permutation
from diffusers_repr.training.transforms import augment

__all__ = [
    "ImagePixels",
    "LabelledImages",
    "augment",
    "batch_indices",
    "load_split",
    "permutation",
]


def load_split(name: str, split: str) -> datasets.Dataset:
    """A split of `digits` (scikit-learn's) or of a path or Hub id that `datasets` loads."""
    if name != "digits":
        return datasets.load_dataset(name, split=split)
    if split not in SPLIT_SIZES:
        raise ValueError(f"The digits have no split {split!r}, only {list(SPLIT_SIZES)}; see --dataset_split.")
    return load_digits_splits()[split]


class LabelledImages(Dataset):
    """`ImagePixels` with the class ids of a `ClassLabel` column, for a model with one more embedding than classes."""

    def __init__(self, images: ImagePixels, column: str, num_class_embeds: int) -> None:
        feature = images.data.features.get(column)
        if not isinstance(feature, datasets.ClassLabel):
            found = {name: type(feature).__name__ for name, feature in images.data.features.items()}
            raise ValueError(f"No column {column!r} of type ClassLabel in {found}; choose by --label_column.")
        if num_class_embeds != feature.num_classes + 1:
            raise ValueError(
                f"`model` has num_class_embeds={num_class_embeds}; the {feature.num_classes} classes of {column!r} "
                f"and the null id need {feature.num_classes + 1}."
            )
        self.images, self.labels = images, list(images.data[column])
        unknown = sum(label is None or label < 0 for label in self.labels)
        if unknown:
            raise ValueError(f"{unknown} of {len(self.labels)} images have no class in {column!r}; leave them out.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]
