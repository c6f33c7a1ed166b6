"""Percentage of correct key points: how many matched points lie near enough to where they belong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PCKReference = Literal["box", "image"]


@dataclass(frozen=True)
class PCK:
    """Shares of correct points of many pairs of images.

    Attributes:
        per_point: Correct points of all pairs over all points.
        per_image: Mean over pairs of the share of each.
        alpha: Share of the reference length that a match may be off.
        points: Number of points.
        pairs: Number of pairs with points.
    """

    per_point: float
    per_image: float
    alpha: float
    points: int
    pairs: int


def reference_length(
    reference: PCKReference, size: tuple[int, int], box: Sequence[float] | None = None
) -> float:  # fmt: skip
    """The length that `alpha` is a share of, in pixels: the longer side of the object's box, or of the image.

    Args:
        reference: `box`, as SPair-71k's main numbers; `image` gives the larger PCK.
        size: (H, W) of the target image.
        box: Of the object in the target image: left, top, right, bottom.

    Raises:
        ValueError: For another reference; for `box` without a box, or with one of no extent.

    Example:
        >>> reference_length("box", (300, 400), (10, 20, 110, 70)), reference_length("image", (300, 400))
        (100.0, 400.0)
    """
    if reference == "image":
        return float(max(size))
    if reference != "box":
        raise ValueError(f"A threshold is a share of the 'box' or of the 'image'; got {reference!r}.")
    if box is None:
        raise ValueError("This pair has no box of its object in the target image; measure PCK by reference='image'.")
    values = [float(value) for value in box]
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[2] <= values[0] or values[3] <= values[1]:
        raise ValueError(f"A box is left, top, right, bottom, in pixels, with right of left and below; got {box!r}.")
    return max(values[2] - values[0], values[3] - values[1])


def correct_points(matches: Tensor, truth: Tensor, length: float, alpha: float = 0.1) -> Tensor:
    """Which matches lie within `alpha * length` pixels of the truth, the bound included (SPair-71k's rule).

    Args:
        matches: `(N, 2)` as (x, y).
        truth: `(N, 2)`.
        length: See `reference_length`.
        alpha: Above 0.

    Returns:
        `(N,)` bool.

    Raises:
        ValueError: For unequal shapes, or an alpha or length that is not above 0.

    Example:
        >>> import torch
        >>> correct_points(torch.tensor([[10.0, 0], [10.01, 0]]), torch.zeros(2, 2), 100)
        tensor([ True, False])
    """
    if matches.shape != truth.shape or matches.ndim != 2 or matches.shape[1] != 2:
        raise ValueError(
            f"Matches and truth must both be (N, 2); got {tuple(matches.shape)} and {tuple(truth.shape)}."
        )
    if not alpha > 0 or not length > 0:
        raise ValueError(f"alpha and the reference length must be above 0; got {alpha!r} and {length!r}.")
    distance = (matches.cpu().double() - truth.cpu().double()).square().sum(1).sqrt()
    return distance / length <= alpha  # a quotient: 7 / 70 is 0.1 to the last bit, 0.1 * 70 is not 7


def pck(correct: Sequence[Tensor], alpha: float = 0.1) -> PCK:
    """Both ways to count correct points: all points alike, and all pairs alike.

    Args:
        correct: Of each pair `(N,)` bool, see `correct_points`. Pairs without points count nowhere.
        alpha: That was used, for the record.

    Raises:
        ValueError: Without a single point.

    Example:
        >>> import torch
        >>> found = pck([torch.ones(1, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)])
        >>> found.per_point, found.per_image
        (0.1, 0.5)
    """
    held = [one.bool() for one in correct if len(one)]
    if not held:
        raise ValueError("PCK of no points is undefined; give pairs with key points in both images.")
    hits = [int(one.sum()) for one in held]
    counts = [len(one) for one in held]
    shares = [hit / count for hit, count in zip(hits, counts, strict=True)]
    return PCK(sum(hits) / sum(counts), math.fsum(shares) / len(shares), alpha, sum(counts), len(counts))


__all__ = ["PCK", "PCKReference", "correct_points", "pck", "reference_length"]
