"""HPatches' protocol: homographies from mutual nearest neighbours among key points, and how far off corners land."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.hpatches import PlaneSequence
from diffusers_repr.data.scikit_image import require_scikit_image
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.corner_error import THRESHOLDS, corner_accuracy, corner_error
from diffusers_repr.metrics.nearest import Likeness
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.homography import HomographyMethod
from diffusers_repr.tasks.matches import as_pil


@dataclass(frozen=True)
class PlaneReport:
    """What was measured of sequences of planes.

    Attributes:
        accuracy: `illumination`, `viewpoint`, `all`: threshold in pixels -> share of pairs.
        errors: Sequence -> mean corner error of images 2 to 6, infinite where no homography was found.
    """

    accuracy: dict[str, dict[float, float]]
    errors: dict[str, list[float]]


def evaluate_planes(
    task: Correspondence,
    sequences: Sequence[PlaneSequence],
    *,
    method: HomographyMethod = "lmeds",
    likeness: Likeness = "cosine",
    detect: Callable[[Any], Tensor] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    **settings: Any,
) -> PlaneReport:
    """Corner accuracy of the homographies from the first image of each sequence to the others.

    Args:
        task: What reads features.
        sequences: See `load_hpatches`.
        method: `lmeds` with `cosine` for DIFT's Stable Diffusion, `ransac` with `l2` for its ADM.
        likeness: Of mutual nearest neighbours.
        detect: From an image to key points `(N, 2)`; those of the sequences if None.
        thresholds: In pixels.
        **settings: Of `find_homography`.

    Raises:
        ValueError: If a sequence has no key points and nothing detects any.
    """
    errors: dict[str, list[float]] = {}
    for sequence in sequences:
        if sequence.points is None and detect is None:
            raise ValueError(
                f"{sequence.name} has no key points: load_hpatches(folder, key_points=...), or detect=harris_points."
            )
        read = []
        for at in range(len(sequence.files)):
            image = sequence.image(at)
            points = sequence.points[at] if detect is None and sequence.points is not None else detect(image)  # type: ignore[misc]
            read.append((task.encode(image), points))
        first, points = read[0]
        own = []
        for (other, among), truth in zip(read[1:], sequence.homographies, strict=True):
            found = task(first, other, points, among, likeness=likeness).homography(method, **settings)
            own.append(corner_error(found.matrix, truth, first.size))
        errors[sequence.name] = own
    return PlaneReport(corner_accuracy(errors, thresholds), errors)


def harris_points(image: Any, count: int = 1000, distance: int = 3) -> Tensor:
    """Corners of an image by scikit-image (Harris and Stephens 1988), `(N, 2)` as (x, y), strongest first.

    The numbers of DIFT's paper are of SuperPoint's key points, which come as files; these are for images without.

    Args:
        image: PIL image, array or tensor.
        count: At most.
        distance: Pixels between two of them.

    Raises:
        ImportError: If scikit-image is missing.
    """
    check_whole("count", count)
    feature = require_scikit_image().feature
    grey = np.asarray(as_pil(image).convert("L"), float) / 255
    corners = feature.corner_peaks(
        feature.corner_harris(grey), min_distance=distance, num_peaks=count, threshold_rel=1e-4
    )
    return torch.from_numpy(corners[:, ::-1].astype(np.float64).copy())


__all__ = ["PlaneReport", "evaluate_planes", "harris_points"]
