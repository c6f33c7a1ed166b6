"""Which columns of a data set hold what: the one choice for training, features, probes and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

LABEL = "label"  # the name by which whole numbers are class ids, and other kinds are told of
_LABEL_LIKE = (LABEL, "labels", "class", "classes", "category", "target")
_KINDS = {"string": "texts", "large_string": "texts", "bool": "true and false"}


@dataclass(frozen=True)
class Columns:
    """Names of columns; None where there is none.

    Attributes:
        image: Images.
        label: Class ids.
        caption: Texts.
        mask: Segmentation masks.
        points: Points on the image.
        unlabelled: Without class ids, why: what the columns hold that might be meant, and what makes ids of it.
    """

    image: str
    label: str | None = None
    caption: str | None = None
    mask: str | None = None
    points: str | None = None
    unlabelled: str = field(default="", compare=False)

    def used(self) -> list[str]:
        """The columns that there are, the images first."""
        return [c for c in (self.image, self.label, self.caption, self.mask, self.points) if c is not None]


def choose_columns(
    features: Mapping[str, Any],
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    mask: str | None = None,
    points: str | None = None,
    *,
    labelled: bool = True,
    name: str = "dataset",
) -> Columns:
    """Find the columns of images and of class ids by their type, and check those that are named.

    Args:
        features: Type of each column, as `datasets` has them.
        image: The one column of type `datasets.Image`, that of masks apart, if None.
        label: The column of type `ClassLabel`, or whole numbers named `label`, if None.
        caption: No texts if None.
        mask: Class ids of pixels, as images or as arrays of whole numbers `(H, W)`; no masks if None.
        points: Lists of `[x, y]` or `[x, y, visible]`; no points if None.
        labelled: Whether class ids are wanted at all.
        name: Of the data set, for messages.

    Raises:
        ValueError: If a column is not there or holds something else.
    """
    for chosen in (image, mask, points, label if labelled else None):
        _there(features, chosen, name)
    image = _image(features, image, mask, name)
    if not labelled:
        label = None
    elif label is None:
        classes = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
        found = classes or [k for k in (LABEL,) if _is_whole(features.get(k))]
        label = found[0] if found else None
    if label is not None and not _is_whole(features[label]):
        raise ValueError(_no_ids(label, features[label], name))
    if caption is not None and _dtype(features.get(caption)) not in ("string", "large_string"):
        kinds = {column: _dtype(kind) or type(kind).__name__ for column, kind in features.items()}
        raise ValueError(f"No column {caption!r} of texts in {name}; its columns are {kinds}.")
    if mask is not None and not isinstance(features[mask], datasets.Image):
        _grid(features[mask], _is_whole, f"Column {mask!r} of {name}", "masks: images, or whole numbers (H, W)")
    if points is not None:
        _grid(features[points], _is_number, f"Column {points!r} of {name}", "points: lists of [x, y], or Array2D")
    unlabelled = "" if label is not None else _unlabelled(features, (image, mask, points, caption), name)
    return Columns(image, label, caption, mask, points, unlabelled)


def _no_ids(column: str, feature: Any, name: str) -> str:
    """What to do with a column of labels that are no class ids."""
    kind = _kind(feature)
    if kind is None:
        return f"Column {column!r} of {name} holds {feature}, not class ids, which are whole numbers, one an image."
    return f"Column {column!r} of {name} holds {kind}, not class ids. {_numbered(column)}"


def _numbered(column: str) -> str:
    """The line that makes class ids of a column."""
    return (
        f"`dataset = dataset.class_encode_column({column!r})` numbers them and keeps them as names; for a command, "
        "save the result by `dataset.save_to_disk(folder)` and give that folder."
    )


def _unlabelled(features: Mapping[str, Any], used: Sequence[str | None], name: str) -> str:
    """Why there are no class ids, by the columns that are there."""
    others = [column for column in features if column not in used]
    meant = [column for column in _LABEL_LIKE if column in others and _kind(features[column]) is not None]
    if meant:
        return _no_ids(meant[0], features[meant[0]], name)
    whole = [column for column in others if _is_whole(features[column])]
    encoded = [column for column in others if _dtype(features[column]) in _KINDS]
    hints = [f"Whole numbers are in {', '.join(map(repr, whole))}; name one by label_column." if whole else ""]
    if encoded:
        hints += [f"If {encoded[0]!r} holds the classes, {_numbered(encoded[0])}"]
    hints += ["In a folder of images, put each class into a subfolder."]
    return f"{name} has no label column; its columns are {list(features)}. {' '.join(filter(None, hints))}"


def _kind(feature: Any) -> str | None:
    """What a column of single values that are no whole numbers holds, in words; None for anything else."""
    if not isinstance(feature, datasets.Value):
        return None
    dtype = _dtype(feature)
    return _KINDS.get(dtype, f"numbers with fractions ({dtype})" if dtype.startswith(("float", "decimal")) else None)


def innermost(feature: Any) -> tuple[Any, int]:
    """What nested lists or an `Array2D` hold, and how deep."""
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    if isinstance(feature, datasets.Array2D):
        return datasets.Value(feature.dtype), depth + 2
    return feature, depth


def _there(features: Mapping[str, Any], column: str | None, name: str) -> None:
    if column is not None and column not in features:
        images = _of_images(features)
        raise ValueError(f"{name} has no column {column!r}; columns are {list(features)}, images are {images}.")


def _of_images(features: Mapping[str, Any]) -> Sequence[str]:
    return [k for k, v in features.items() if isinstance(v, datasets.Image)]


def _image(features: Mapping[str, Any], image: str | None, mask: str | None, name: str) -> str:
    images = [column for column in _of_images(features) if column != mask]
    if not images:
        raise ValueError(
            f"{name} has no column of images; its columns are {list(features)}. A column of files or of their bytes "
            "becomes one by `dataset.cast_column(column, datasets.Image())`."
        )
    if image is None and len(images) > 1:
        raise ValueError(
            f"{name} has several columns of images: {images}. Choose one by image_column; one that holds class ids "
            "of pixels is a mask_column."
        )
    image = image or images[0]
    if image not in images:
        kind = "the masks" if image == mask else f"{features[image]}, not images"
        raise ValueError(f"Column {image!r} of {name} holds {kind}; images: {images}.")
    return image


def _grid(feature: Any, fits: Any, what: str, wanted: str) -> None:
    held, depth = innermost(feature)
    if depth != 2 or not fits(held):
        raise ValueError(f"{what} holds {feature}, not {wanted}.")


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _is_whole(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or _dtype(feature).startswith(("int", "uint"))


def _is_number(feature: Any) -> bool:
    return _dtype(feature).startswith(("int", "uint", "float"))
