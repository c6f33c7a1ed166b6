"""Points of a column: key points of an image, in its pixels, and which of them are visible."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

_OUTSIDE = 1.0  # pixels a visible point may lie beyond the edge: other tools count from 1, or from corners of pixels


def read_points(value: Any, what: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Points of a row, `(N, 2)` float64 as (x, y), and `(N,)` whether each is visible.

    Args:
        value: N times `[x, y]`, or `[x, y, visible]` where 0 is not (COCO's `v`); None: no points. The centre of the
            first pixel is (0, 0).
        what: Names them in messages: `The points of row 3`.
        size: (H, W) of the image.

    Raises:
        ValueError: If they are something else, or a visible one is not finite or lies outside of the image.
    """
    points, visible = parse_points(value, what)
    bound = points.new_tensor([size[1], size[0]])
    inside = ((points >= -_OUTSIDE) & (points <= bound)).all(1)  # false for NaN too
    wrong = (visible & ~inside).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{what}: number {at} is (x, y) = {tuple(points[at].tolist())}, outside of the image of {size[1]} x "
            f"{size[0]} (width x height). Give x before y, in pixels; a third number 0 says that it is not visible."
        )
    return points.nan_to_num(0.0, 0.0, 0.0), visible


def parse_points(value: Any, what: str) -> tuple[Tensor, Tensor]:
    """Points of a row as they stand, `(N, 2)` float64, and `(N,)` whether each is visible.

    Raises:
        ValueError: If they are something else.
    """
    try:
        held = np.asarray([] if value is None else value, dtype=np.float64)
    except (TypeError, ValueError):  # points of unequal length, or nothing among the numbers
        held = np.empty(1)
    if not held.size:
        held = held.reshape(0, 2)
    if held.ndim != 2 or held.shape[1] not in (2, 3):
        raise ValueError(f"{what} are no list of [x, y] or [x, y, visible]: {str(value)[:80]}.")
    visible = torch.from_numpy(held[:, 2] != 0) if held.shape[1] == 3 else torch.ones(len(held), dtype=torch.bool)
    return torch.from_numpy(held[:, :2]), visible


def check_points(points: Any, size: tuple[int, int], what: str) -> Tensor:
    """Points to ask about, `(N, 2)` float64 as (x, y): all of them in the image.

    Args:
        points: N times (x, y) in pixels, as numbers, an array or a tensor; one point alone too. The centre of the
            first pixel is (0, 0), so that x lies from -0.5 to W - 0.5.
        size: (H, W) of the image.
        what: Names them in messages: `points`.

    Raises:
        ValueError: For no points, for something else, and for points outside of the image; says so where they would
            lie inside as (y, x).

    Example:
        >>> check_points([[3, 5], [19, 39]], (40, 20), "points").tolist()
        [[3.0, 5.0], [19.0, 39.0]]
    """
    try:
        held = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, dtype=np.float64)
    except (TypeError, ValueError):  # points of unequal length, or nothing among the numbers
        held = np.empty(1)
    held = held[None] if held.shape == (2,) else held
    if held.ndim != 2 or held.shape[1] != 2 or not len(held):
        raise ValueError(f"{what} must be one (x, y) in pixels or a list of them; got {str(points)[:80]}.")
    bound = np.array([size[1], size[0]]) - 0.5
    outside = ~((held >= -0.5) & (held <= bound)).all(1)  # true for NaN too
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        swapped = bool(((held >= -0.5) & (held <= bound[::-1])).all())
        hint = (
            "They would lie inside as (y, x): give x, to the right, before y, downwards."
            if swapped
            else "x runs to the right from 0, y downwards."
        )
        place = ", ".join(f"{value:g}" for value in held[at])
        raise ValueError(
            f"{what}: number {at} is (x, y) = ({place}), outside of the image of {size[1]} x {size[0]} (width x "
            f"height). {hint}"
        )
    return torch.from_numpy(held)


def pad_points(points: Tensor, visible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` points, float32, and whether they are visible; zeros that are not fill up."""
    kept = min(count, len(points))
    filled, seen = torch.zeros(count, 2), torch.zeros(count, dtype=torch.bool)
    filled[:kept], seen[:kept] = points[:kept].float(), visible[:kept]
    return filled, seen


def most_points(data: datasets.Dataset, column: str) -> int:
    """The largest number of points in a row, at least 1, without reading any image."""
    table = data.select_columns([column]).with_format("arrow")[:]
    lengths = [pyarrow.compute.max(pyarrow.compute.list_value_length(_plain(c))) for c in table.column(0).chunks]
    return max([1, *(length.as_py() or 0 for length in lengths)])


def _plain(chunk: Any) -> Any:
    return chunk.storage if isinstance(chunk, pyarrow.ExtensionArray) else chunk
