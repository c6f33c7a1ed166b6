"""What a reference has at points, brought to others: Readout Guidance (Luo et al. 2024, arXiv 2312.02150)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.guidance.readout.base import as_pixels
from diffusers_repr.guidance.readout.reference import ReferenceComparison

Point = tuple[int, int]


@dataclass(frozen=True, eq=False)
class DragComparison(ReferenceComparison):
    """How far readouts are from a reference's at moved points.

    Attributes:
        points: Pairs (p1, p2), each (y, x) in pixels of the readout.
    """

    points: Any = None
    needs: ClassVar[tuple[str, ...]] = (*ReferenceComparison.needs, "points")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("points", _points(self.points))

    def distance(self, read: Tensor, reference: Tensor, x: Tensor) -> Tensor:
        """As `drag_loss`."""
        return drag_loss(read, reference, self.points)


def drag_loss(read: Tensor, reference: Tensor, points: Sequence[tuple[Point, Point]]) -> Tensor:
    """`-1/2 mean S[p1, p2] + 1/2 mean S[p1, p1]` with `S[p, q] = (cos(r_reference[p], r[q]) + 1) / 2`.

    The first part brings to p2 what the reference has at p1; the second removes what has stayed at p1.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        reference: Those of the reference, the same shape.
        points: Pairs (p1, p2), each point (y, x) in pixels of the readouts.

    Returns:
        `(B,)`.

    Raises:
        ValueError: For points outside of the readouts.
    """
    height, width = read.shape[-2:]
    outside = [p for pair in points for p in pair if not (0 <= p[0] < height and 0 <= p[1] < width)]
    if outside:
        raise ValueError(
            f"points {outside} lie outside of the readouts, which are {height} x {width} (H x W); points are (y, x) "
            "in their pixels, from 0."
        )
    place = torch.tensor(points, device=read.device)  # (P, 2 points, y and x)
    (y1, x1), (y2, x2) = place[:, 0].T, place[:, 1].T
    source = reference[:, :, y1, x1]
    moved = functional.cosine_similarity(source, read[:, :, y2, x2], dim=1).mean(1)
    stayed = functional.cosine_similarity(source, read[:, :, y1, x1], dim=1).mean(1)
    return (stayed - moved) / 4  # (stayed + 1) / 2 / 2 - (moved + 1) / 2 / 2


def _points(value: Any) -> tuple[tuple[Point, Point], ...]:
    """As pairs of points of whole numbers."""
    pairs = list(value) if hasattr(value, "__iter__") else []
    if not pairs or any(not hasattr(pair, "__len__") or len(pair) != 2 for pair in pairs):
        raise ValueError(f"points must be pairs ((y, x) in the reference, (y, x) in the sample); got {value!r}.")
    return tuple(tuple(as_pixels("A point", p, "y, x") for p in pair) for pair in pairs)  # type: ignore[misc]
