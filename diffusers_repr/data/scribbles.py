"""Scribbles: a line through each region of a mask, all other pixels of no class; and scenes with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, DatasetInfo, Features, Image, Value
from PIL import Image as PILImage

from diffusers_repr.data.masks import IGNORE_INDEX
from diffusers_repr.data.scenes import MASK_NAMES, describe, scenes

SCRIBBLES = "scribbles"  # name of the data set of scenes
# Seeds of the lines, by split: unlike those of the scenes.
_STREAM = 7


def draw_scribbles(
    regions: np.ndarray,
    classes: np.ndarray,
    rng: np.random.Generator,
    share: tuple[float, float] = (0.5, 0.8),
    width: int = 1,
    ignore_index: int = IGNORE_INDEX,
) -> np.ndarray:
    """A line in every connected region: a part of a shortest way inside it between two of its far points.

    Args:
        regions: `(H, W)` whole numbers; equal neighbours are of one region.
        classes: `(H, W)` class ids, one a region; regions of `ignore_index` get no line.
        rng: Draws the points, and which part is kept.
        share: Least and most of the way that is kept.
        width: Of the line in pixels; it stays inside its region.
        ignore_index: Of all pixels that no line covers.

    Returns:
        `(H, W)`, dtype of `classes`.

    Raises:
        ValueError: For unequal shapes, a share outside of (0, 1], and a width below 1.

    Example:
        >>> mask = np.array([[0, 0, 0, 0], [1, 1, 1, 1]])
        >>> lines = draw_scribbles(mask, mask, np.random.default_rng(0))
        >>> sorted(set(lines[0].tolist())), sorted(set(lines[1].tolist()))
        ([0, 255], [1, 255])
    """
    if regions.ndim != 2 or regions.shape != classes.shape:
        raise ValueError(f"Regions and classes are (H, W) alike; got {regions.shape} and {classes.shape}.")
    if not 0 < share[0] <= share[1] <= 1 or width < 1:
        raise ValueError(f"share lies in (0, 1], the lower first, width from 1 up; got {share} and {width}.")
    found = np.full_like(classes, ignore_index)
    for region in _connected(regions):
        place = region[0]
        if classes[place] == ignore_index:
            continue
        inside = set(region)
        start = region[int(rng.integers(len(region)))]
        *_, one = _distances(start, inside)
        way = _way(one, inside, rng)
        kept = max(1, round(float(rng.uniform(*share)) * len(way)))
        first = int(rng.integers(0, len(way) - kept + 1))
        reach = range(-((width - 1) // 2), width // 2 + 1)
        for y, x in way[first : first + kept]:
            for near in ((y + down, x + right) for down in reach for right in reach):
                if near in inside:
                    found[near] = classes[place]
    return found


def _way(start: tuple[int, int], inside: set[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """A shortest way inside from a point to one of the farther half, by whichever neighbour the draws say."""
    distance = _distances(start, inside)
    far = sorted(distance, key=distance.__getitem__)[len(distance) // 2 :]
    at = far[int(rng.integers(len(far)))]
    way = [at]
    while distance[at]:
        nearer = [near for near in _neighbours(at) if distance.get(near) == distance[at] - 1]
        at = nearer[int(rng.integers(len(nearer)))]
        way.append(at)
    return way


def _distances(start: tuple[int, int], inside: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Steps to each point that is reached, the farthest last."""
    found, waiting = {start: 0}, deque([start])
    while waiting:
        at = waiting.popleft()
        for near in _neighbours(at):
            if near in inside and near not in found:
                found[near] = found[at] + 1
                waiting.append(near)
    return found


def _neighbours(at: tuple[int, int]) -> Iterator[tuple[int, int]]:
    y, x = at
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if down or right:
                yield y + down, x + right


def _connected(regions: np.ndarray) -> list[list[tuple[int, int]]]:
    """The points of each region of equal numbers, touching at sides or corners, row by row."""
    found, seen = [], set()
    for value in np.unique(regions).tolist():
        own = {(int(y), int(x)) for y, x in np.argwhere(regions == value)}
        for point in sorted(own):
            if point not in seen:
                reached = sorted(_distances(point, own))
                seen.update(reached)
                found.append(reached)
    return found


def load_scribbled_scenes(split: str, count: int, seed: int = 0, **how: Any) -> Dataset:
    """Scenes of `diffusers_repr.data.scenes` with a line in each thing and in the ground, a `datasets.Dataset`.

    Its columns: `image`; `caption`, without colours; `mask`, the true class of every pixel as `MASK_NAMES` names
    them; `scribble`, the same where a line is and 255 elsewhere.

    Args:
        split: As `scenes`.
        count: How many.
        seed: Another gives other scenes and lines.
        **how: `share` and `width` of `draw_scribbles`.

    Raises:
        ValueError: As `scenes` and `draw_scribbles`.
    """
    rows: dict[str, list[Any]] = {"image": [], "caption": [], "mask": [], "scribble": []}
    for index, scene in enumerate(scenes(split, count, seed)):
        rng = np.random.default_rng([seed, index, _STREAM])
        mask = scene.mask()
        lines = draw_scribbles(scene.panoptic(), mask, rng, **how)
        named = describe([(thing.colour, thing.kind) for thing in scene.things], colours=False)
        rows["caption"].append(named)
        for name, pixels in {"image": scene.image, "mask": mask, "scribble": lines}.items():
            rows[name].append(PILImage.fromarray(pixels))
    features = Features({"image": Image(), "caption": Value("string"), "mask": Image(), "scribble": Image()})
    return Dataset.from_dict(rows, info=DatasetInfo(features=features, dataset_name=SCRIBBLES))


__all__ = ["MASK_NAMES", "SCRIBBLES", "draw_scribbles", "load_scribbled_scenes"]
