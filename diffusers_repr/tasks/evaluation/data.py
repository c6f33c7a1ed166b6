"""The data of evaluations: labelled images, images with masks, pairs of images with points."""

from __future__ import annotations

from typing import Any, Literal

from diffusers_repr.data.attributed import AttributedImages, load_attributed
from diffusers_repr.data.coins import COINS, load_coins
from diffusers_repr.data.image_data import ImageData, load_images
from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.data.known_pairs import PHOTOGRAPHS, load_known_pairs
from diffusers_repr.data.masked import image_size
from diffusers_repr.data.panoptic_data import PanopticConfig, PanopticTrainData
from diffusers_repr.data.spair import load_spair
from diffusers_repr.data.splits import open_split
from diffusers_repr.sweep.splits import draw_rows, drawn_rows
from diffusers_repr.tasks.images import class_data


def open_labelled_images(
    path: str, split: str, *, image_column: str | None = None, label_column: str | None = None
) -> ImageData:
    """A split of images with class ids; what is wrong with the labels is told here.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        image_column: Found by type if None.
        label_column: Likewise.
    """
    found = load_images(path, split, image_column, label_column)
    class_data(found, split)
    return found


def open_attributed_images(
    path: str,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    attributes: list[str] | None = None,
) -> AttributedImages:
    """A split of images with class ids, and columns that a code may tell.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        image_column: Found by type if None.
        label_column: Likewise.
        attributes: Columns of class ids or numbers.
    """
    found = load_attributed(path, split, image_column, label_column, attributes or ())
    class_data(found, split)
    return found


def open_masked_images(
    path: str,
    split: str,
    *,
    image_column: str | None = None,
    mask_column: str = "mask",
    mask_names: list[str] | None = None,
    ignore_index: int = 255,
) -> ImageData:
    """A split of images with masks; `coins` are crops of scikit-image's photograph.

    Args:
        path: As in `load_images`, or `coins`.
        split: Name of the split.
        image_column: Found by type if None.
        mask_column: Of the masks.
        mask_names: Of the classes, in the order of their ids.
        ignore_index: Id of pixels of no class.
    """
    if path == COINS:
        return load_coins(split)  # type: ignore[arg-type]
    masks: dict[str, Any] = {"mask_column": mask_column, "mask_names": mask_names, "ignore_index": ignore_index}
    return load_images(path, split, image_column, **masks)


def open_pairs(
    path: str,
    split: str,
    *,
    category: str | None = None,
    size: Literal["large", "small"] = "large",
    points: int = 24,
) -> ImagePairs:
    """A split of pairs of images with points: a local copy of SPair-71k, or `photographs` under known changes.

    Args:
        path: Folder of SPair-71k, or `photographs`.
        split: `trn`, `val`, `test`; of the photographs `train` and `test`.
        category: Pairs of one category alone, of SPair-71k.
        size: Of its lists.
        points: A pair, at most, of the photographs.
    """
    if path == PHOTOGRAPHS:
        return load_known_pairs(split, points)
    return load_spair(path, split, size, category)  # type: ignore[arg-type]


def open_panoptic_images(
    path: str,
    split: str,
    *,
    image_column: str = "image",
    panoptic_column: str = "panoptic",
    segments_column: str = "segments",
    class_key: str = "class",
    ground: str | None = None,
    exclude: list[str] | None = None,
) -> PanopticTrainData:
    """A split of images of one size with the segment of every pixel.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        image_column: Of the images.
        panoptic_column: Of the ids of segments.
        segments_column: Of the classes of segments.
        class_key: As in `PanopticConfig`.
        ground: Likewise.
        exclude: Likewise.
    """
    columns = {"image_column": image_column, "panoptic_column": panoptic_column, "segments_column": segments_column}
    config = PanopticConfig(path, split, **columns, class_key=class_key, ground=ground, exclude=exclude)
    rows = open_split(path, split)
    if image_column not in rows.column_names:
        raise ValueError(f"There is no column {image_column!r}; the data have {', '.join(rows.column_names)}.")
    return PanopticTrainData(rows, config, 3, image_size(rows[0][image_column]))


def first_rows(data: Any, count: int, seed: int) -> Any:
    """So many rows of a split: images drawn by a seed, of each class its share; of all else the first.

    Args:
        data: What an opener gave.
        count: Of rows.
        seed: Of the draw.

    Raises:
        TypeError: For data of which no part can be taken.
    """
    if isinstance(data, ImageData):
        return draw_rows(data, count, seed)
    if isinstance(data, AttributedImages):
        return data.select(drawn_rows(data.images, min(count, len(data)), seed))
    if isinstance(data, ImagePairs):
        return data.first(count)
    if hasattr(data, "select"):
        return data.select(range(min(count, len(data))))
    raise TypeError(f"No part can be taken of a {type(data).__name__}; leave out limit and train_limit.")


__all__ = [
    "first_rows",
    "open_attributed_images",
    "open_labelled_images",
    "open_masked_images",
    "open_pairs",
    "open_panoptic_images",
]
