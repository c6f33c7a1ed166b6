"""Crops of scikit-image's photograph of 24 coins, with masks: the data set `coins` of recipes."""

from __future__ import annotations

from typing import Literal

import datasets
import numpy as np
from PIL import Image

from diffusers_repr.data.image_data import ImageData, from_dataset
from diffusers_repr.data.scikit_image import require_scikit_image

COINS = "coins"
NAMES = ["ground", "coin"]
SIDE = 48  # of a crop; 6 x 8 of them
TEST = 28  # crops to measure on; the other 20 are to learn from


def coin_crops() -> tuple[list[Image.Image], list[np.ndarray]]:
    """48 disjoint crops of 48 x 48 pixels, and their masks `(48, 48)` int64: 0 ground, 1 coin.

    The masks are made by a watershed on the edges, grown from what is darker than 30 (ground) and brighter than 150
    (coin), holes filled, as scikit-image's guide segments them.

    Raises:
        ImportError: If scikit-image is missing.
    """
    require_scikit_image()
    from scipy import ndimage
    from skimage import data, filters, morphology, segmentation

    photograph = data.coins()
    markers = np.where(photograph < 30, 1, np.where(photograph > 150, 2, 0)).astype(np.int32)
    mask = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photograph), markers) == 2)
    mask = morphology.remove_small_objects(mask, max_size=200).astype(np.int64)
    corners = [(y, x) for y in range(0, SIDE * 6, SIDE) for x in range(0, SIDE * 8, SIDE)]
    crops = [(slice(y, y + SIDE), slice(x, x + SIDE)) for y, x in corners]
    return [Image.fromarray(photograph[crop]).convert("RGB") for crop in crops], [mask[crop] for crop in crops]


def load_coins(split: Literal["train", "test"]) -> ImageData:
    """A split of the crops, drawn once and for all; the columns are `image` and `mask`.

    Raises:
        ValueError: For another split.
        ImportError: If scikit-image is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"{COINS!r} has no split {split!r}, only ['train', 'test'].")
    images, masks = coin_crops()
    order = np.random.default_rng(0).permutation(len(images))
    rows = sorted(order[TEST:] if split == "train" else order[:TEST])
    shown = [Image.fromarray(masks[row].astype(np.uint8)) for row in rows]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": [images[row] for row in rows], "mask": shown}, features=features)
    return from_dataset(made, "image", name=COINS, split=split, mask_column="mask", mask_names=NAMES)


__all__ = ["COINS", "NAMES", "coin_crops", "load_coins"]
