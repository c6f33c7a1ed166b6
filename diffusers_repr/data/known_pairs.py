"""Photographs that scikit-image ships, changed in ways that are known: pairs whose matches have a truth.

Each kind of change gives an image and a function that takes points (x, y) to where they belong. `motorcycle` is a real
stereo pair with its measured disparity (Middlebury 2014). They are the data set `photographs` of recipes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.points import check_points
from diffusers_repr.data.scikit_image import require_scikit_image

PHOTOGRAPHS = "photographs"
CHOSEN_ON, MEASURED_ON = ("coffee", "rocket"), ("astronaut", "chelsea", "retina")  # the splits train and test
HEIGHT = 192  # of all photographs; the width follows
KINDS = ("homography", "strong homography", "crop", "flip", "colour")
Mapped = Callable[[np.ndarray], np.ndarray]


@functools.cache  # each recipe of a table asks for them, and SIFT takes seconds
def load_known_pairs(split: Literal["train", "test"], points: int = 24) -> ImagePairs:
    """The pairs to choose features on, or those to measure on, which the stereo pair is among.

    Args:
        split: `train` or `test`.
        points: A pair, at most.

    Raises:
        ValueError: For another split.
        ImportError: If scikit-image is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"{PHOTOGRAPHS!r} has no split {split!r}, only ['train', 'test'].")
    train = split == "train"
    return pairs_of(CHOSEN_ON if train else MEASURED_ON, points, stereo=not train, seed=int(train))


def photograph(name: str) -> Image.Image:
    """One of scikit-image's photographs, 192 pixels high."""
    data = require_scikit_image().data
    image = Image.fromarray(np.ascontiguousarray(getattr(data, name)()[..., :3]))
    return image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)


def changed(image: Image.Image, kind: str, seed: int) -> tuple[Image.Image, Mapped]:
    """The image after a change, and where its points went.

    Args:
        image: Any.
        kind: One of `KINDS`.
        seed: Of crops and homographies.
    """
    transform = require_scikit_image().transform
    rng, (width, height) = np.random.default_rng(seed), image.size
    if kind == "flip":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), lambda p: np.stack([width - 1 - p[:, 0], p[:, 1]], 1)
    if kind == "crop":
        w, h = round(0.6 * width), round(0.6 * height)
        left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        large = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)
        return large, lambda p: (p + 0.5 - (left, top)) * (width / w, height / h) - 0.5
    if kind == "colour":
        red, green, blue = (band.point(lambda v, g=g: round(255 * (v / 255) ** g)) for band, g in zip(
            image.split(), (0.6, 1.0, 1.6), strict=True))  # fmt: skip
        return ImageEnhance.Contrast(Image.merge("RGB", (red, green, blue))).enhance(0.7), lambda p: p
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    reach = (0.12 if kind == "homography" else 0.28) * np.array([width, height])
    model = transform.ProjectiveTransform.from_estimate(corners, corners + rng.uniform(-1, 1, (4, 2)) * reach)
    pixels = transform.warp(np.asarray(image), model.inverse, mode="reflect", order=1)
    return Image.fromarray((255 * pixels).round().astype(np.uint8)), lambda p: model(p)


def motorcycle() -> tuple[Image.Image, Image.Image, Mapped]:
    """Left and right photograph, and where points of the left one lie in the right one; NaN where not measured."""
    left, right, disparity = require_scikit_image().data.stereo_motorcycle()
    scale = HEIGHT / left.shape[0]
    size = (round(left.shape[1] * scale), HEIGHT)
    images = [Image.fromarray(side).resize(size, Image.Resampling.LANCZOS) for side in (left, right)]
    true = np.where(np.isfinite(disparity), disparity, np.nan)

    def mapped(points: np.ndarray) -> np.ndarray:
        full = ((points + 0.5) / (size[0] / left.shape[1], scale) - 0.5).round().astype(int)
        x, y = np.clip(full[:, 0], 0, left.shape[1] - 1), np.clip(full[:, 1], 0, left.shape[0] - 1)
        return np.stack([points[:, 0] - true[y, x] * size[0] / left.shape[1], points[:, 1]], 1)

    return images[0], images[1], mapped


def sift(image: Image.Image) -> Any:
    """SIFT's key points and descriptors of an image."""
    found = require_scikit_image().feature.SIFT()
    found.detect_and_extract(np.asarray(image.convert("L")) / 255)
    return found


def pairs_of(names: Sequence[str], points: int, stereo: bool, seed: int = 0) -> ImagePairs:
    """Every kind of change of every photograph, asked about at SIFT's own key points, spread at random.

    Args:
        names: Of photographs.
        points: A pair, at most.
        stereo: Whether the stereo pair is added.
        seed: Of the changes and of the points.
    """
    images: list[Image.Image] = []
    pairs: list[PairPoints] = []

    def add(source: int, target: Image.Image, mapped: Mapped, kind: str) -> None:
        rng, (width, height) = np.random.default_rng(seed), target.size
        key = np.unique(sift(images[source]).keypoints[:, ::-1].astype(float), axis=0)
        truth = mapped(key)
        inside = (truth >= 0).all(1) & (truth <= (width - 1, height - 1)).all(1)  # false for NaN
        kept = rng.permutation(np.flatnonzero(inside))[:points]
        size = images[source].height, images[source].width
        images.append(target)
        pairs.append(
            PairPoints(
                source,
                len(images) - 1,
                check_points(key[kept], size, "points"),
                torch.from_numpy(truth[kept]),
                category=kind,
                name=f"{kind} {len(pairs)}",
            )
        )

    for at, name in enumerate(names):
        images.append(photograph(name))
        source = len(images) - 1
        for kind in KINDS:
            add(source, *changed(images[source], kind, 100 * seed + at), kind)
    if stereo:
        left, right, mapped = motorcycle()
        images.append(left)
        add(len(images) - 1, right, mapped, "stereo")
    return ImagePairs(images, tuple(pairs), "photographs of scikit-image")


def sift_matches(pairs: ImagePairs, pair: PairPoints, found: dict[int, Any]) -> Tensor:
    """SIFT's own answers: of each point the target key point with the nearest descriptor, over all orientations.

    Args:
        pairs: That the pair is of.
        pair: Its points are key points of SIFT.
        found: SIFT of images by their places; taken up here.
    """
    for side in (pair.source, pair.target):
        if side not in found:
            found[side] = sift(pairs.image(side))
    source, target = found[pair.source], found[pair.target]
    here, there = (torch.from_numpy(one.descriptors.astype(np.float32)) for one in (source, target))
    distance = torch.cdist(here, there)
    answers = []
    for point in pair.source_points.numpy():
        rows = np.flatnonzero((source.keypoints[:, ::-1] == point).all(1))
        near = distance[torch.from_numpy(rows)]
        best = int(near.flatten().argmin()) % near.shape[1]
        answers.append(target.keypoints[best, ::-1].astype(float))
    return torch.from_numpy(np.array(answers))


__all__ = [
    "KINDS",
    "PHOTOGRAPHS",
    "changed",
    "load_known_pairs",
    "motorcycle",
    "pairs_of",
    "photograph",
    "sift",
    "sift_matches",
]
