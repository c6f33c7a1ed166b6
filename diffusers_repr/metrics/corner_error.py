"""HPatches' measure of a homography: how far it takes the corners of the image from where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

THRESHOLDS = (1.0, 3.0, 5.0)  # pixels


def warp_points(matrix: Tensor, points: Tensor) -> Tensor:
    """Points `(N, 2)` as (x, y) under a homography `(3, 3)`, float64; infinite where they go to infinity.

    Example:
        >>> shift = torch.tensor([[1.0, 0, 5], [0, 1, -2], [0, 0, 1]])
        >>> warp_points(shift, torch.tensor([[1.0, 2.0]]))
        tensor([[6., 0.]], dtype=torch.float64)
    """
    points = points.double()
    moved = torch.cat([points, torch.ones_like(points[:, :1])], dim=1) @ matrix.double().T
    return moved[:, :2] / moved[:, 2:]


def corner_error(found: Tensor | None, truth: Tensor, size: tuple[int, int]) -> float:
    """Mean distance in pixels between the four corner pixels of an image under two homographies.

    Args:
        found: `(3, 3)`; None where none could be found, which is infinitely wrong.
        truth: `(3, 3)`.
        size: (H, W) of the image that is warped.

    Example:
        >>> corner_error(torch.eye(3), torch.tensor([[1.0, 0, 3], [0, 1, 4], [0, 0, 1]]), (10, 20))
        5.0
    """
    if found is None or not bool(torch.isfinite(found).all()):
        return float("inf")
    bottom, right = size[0] - 1, size[1] - 1
    corners = torch.tensor([[0, 0], [0, bottom], [right, 0], [right, bottom]], dtype=torch.float64)
    error = (warp_points(found, corners) - warp_points(truth, corners)).norm(dim=1).mean()
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def corner_accuracy(
    errors: Mapping[str, Sequence[float]], thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, dict[float, float]]:
    """Shares of image pairs whose corner error is at most so many pixels, as HPatches is reported.

    Args:
        errors: Name of the sequence -> corner error of each of its pairs.
        thresholds: In pixels.

    Returns:
        `illumination` (names that begin with `i_`), `viewpoint` (`v_`) and `all`: threshold -> share of pairs; a group
        without a pair is left out.

    Raises:
        ValueError: Without a pair.

    Example:
        >>> corner_accuracy({"i_a": [0.5, 2.0], "v_b": [4.0, float("inf")]})["all"]
        {1.0: 0.25, 3.0: 0.5, 5.0: 0.75}
    """
    groups = {"illumination": "i_", "viewpoint": "v_", "all": ""}
    found = {}
    for group, start in groups.items():
        held = torch.tensor([e for name, values in errors.items() if name.startswith(start) for e in values])
        if len(held):
            found[group] = {t: float((held <= t).double().mean()) for t in thresholds}
    if not found:
        raise ValueError("No pairs: corner accuracy needs at least one homography.")
    return found


__all__ = ["THRESHOLDS", "corner_accuracy", "corner_error", "warp_points"]
