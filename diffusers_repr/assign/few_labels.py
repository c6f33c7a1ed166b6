"""Few labels: which of them a classifier sees, and its fit anew on images that were generated for every class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_repr.assign.classifier import ClassifierAssigner
from diffusers_repr.data.train_data import ImageTrainData


def few_labels(data: ImageTrainData, per_class: int | None, seed: int) -> Tensor:
    """Class ids of all images, `(N,)`, -1 of those whose label is not seen.

    Args:
        data: With a column of class ids.
        per_class: Labels of each class that are seen, drawn by the seed; None: all.
        seed: Of the draw.

    Raises:
        ValueError: Without class ids, and for a class with fewer images than that.
    """
    if data.labels is None:
        raise ValueError(f"A classifier learns from labels, and {data.name} has no column of class ids.")
    known = torch.from_numpy(data.labels)
    if per_class is None:
        return known
    few, generator = torch.full_like(known, -1), torch.Generator().manual_seed(seed)
    for class_id in range(data.num_classes):
        rows = (known == class_id).nonzero()[:, 0]
        if len(rows) < per_class:
            name = (data.class_names or [])[class_id]
            raise ValueError(f"{per_class} labels a class, but {len(rows)} images have the class {name!r}.")
        few[rows[torch.randperm(len(rows), generator=generator)[:per_class]]] = class_id
    return few


def refit_classifier(
    features: Tensor, labels: Tensor, generated: Tensor, classes: Tensor, num_classes: int, **settings: Any
) -> ClassifierAssigner:
    """The last stage of dual pseudo training (You et al. 2023, arXiv 2302.10586): labelled and generated images.

    Args:
        features: Of the real images, `(N, D)`.
        labels: Their class ids, -1 of those whose label is not seen, which take no part.
        generated: Features of generated images, `(M, D)`.
        classes: Of which class each was generated, `(M,)`.
        num_classes: K.
        **settings: Of the `ClassifierAssigner`.

    Returns:
        Fitted on the labels and M rows more.

    Raises:
        ValueError: If the classes have unequal numbers of generated images, or none.

    Example:
        >>> real, made, classes = torch.eye(3), torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> refit_classifier(real, torch.tensor([0, -1, 2]), made, classes, 3).assign(real)
        tensor([0, 1, 2])
    """
    counts = torch.bincount(classes, minlength=num_classes)
    if len(counts) > num_classes or int(counts.min()) == 0 or int(counts.min()) < int(counts.max()):
        raise ValueError(
            f"Every class has as many generated images as any other; of {num_classes} classes there are "
            f"{counts.tolist()}."
        )
    seen = labels >= 0
    assigner = ClassifierAssigner(features.shape[1], num_classes, **settings)
    return assigner.fit(torch.cat([features[seen], generated]), labels=torch.cat([labels[seen], classes]))


__all__ = ["few_labels", "refit_classifier"]
