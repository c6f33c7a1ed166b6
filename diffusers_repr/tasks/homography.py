"""A homography from matches, some of which are wrong: RANSAC or least median of squares, by scikit-image."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.scikit_image import require_scikit_image
from diffusers_repr.hub.checks import check_whole

HomographyMethod = Literal["ransac", "lmeds"]
_LEAST = 4  # matches that determine one


@dataclass(frozen=True, eq=False)
class Homography:
    """What was found.

    Attributes:
        matrix: `(3, 3)` float64, from points (x, y, 1) of the source to the target; None where none was found.
        inliers: `(N,)` bool: matches that agree with it.
        method: `ransac` or `lmeds`.
    """

    matrix: Tensor | None
    inliers: Tensor
    method: str

    def __repr__(self) -> str:
        found = "none found" if self.matrix is None else f"{int(self.inliers.sum())} of {len(self.inliers)} agree"
        return f"Homography({found}, method={self.method!r})"


def find_homography(
    points: Tensor,
    matches: Tensor,
    method: HomographyMethod = "ransac",
    *,
    threshold: float = 3.0,
    trials: int = 1000,
    seed: int = 0,
) -> Homography:
    """The homography that takes points to their matches, whatever some of the matches are.

    `ransac`: most matches within `threshold` pixels. `lmeds`: least median of the squared distances (Rousseeuw 1984),
    which needs no threshold and fewer than half of the matches wrong; those within 2.5 robust standard deviations
    (1.4826 (1 + 5 / (N - 4)) times the root of that median) are then fitted once more, as OpenCV does.

    Args:
        points: `(N, 2)` as (x, y).
        matches: `(N, 2)`.
        method: See above. DIFT's HPatches numbers are by `lmeds` for Stable Diffusion, `ransac` for ADM.
        threshold: Pixels, of `ransac`.
        trials: Samples of four matches at most.
        seed: Of the samples.

    Returns:
        A `Homography`; without a matrix if there are fewer than four matches, or no four that determine one.

    Raises:
        ValueError: For another method, unequal or not finite points, a threshold that is not above 0.
        ImportError: If scikit-image is missing.
    """
    if method not in ("ransac", "lmeds"):
        raise ValueError(f"method is 'ransac' or 'lmeds'; got {method!r}.")
    if points.shape != matches.shape or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"Points and matches must be (N, 2); got {tuple(points.shape)} and {tuple(matches.shape)}.")
    if not threshold > 0:
        raise ValueError(f"threshold is a distance in pixels, above 0; got {threshold!r}.")
    check_whole("trials", trials)
    source, target = (value.detach().cpu().double().numpy() for value in (points, matches))
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("Points and matches must be finite.")
    skimage = require_scikit_image()
    matrix, inliers = None, np.zeros(len(source), bool)
    if len(source) >= _LEAST and method == "ransac":
        matrix, inliers = _ransac(skimage, source, target, threshold, trials, seed)
    elif len(source) >= _LEAST:
        matrix, inliers = _least_median(skimage, source, target, trials, seed)
    return Homography(None if matrix is None else torch.from_numpy(matrix), torch.from_numpy(inliers), method)


def _ransac(
    skimage: Any, source: np.ndarray, target: np.ndarray, threshold: float, trials: int, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    kind = skimage.transform.ProjectiveTransform
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples that determine nothing, and of none that does
        model, inliers = skimage.measure.ransac(
            (source, target),
            kind,
            min_samples=_LEAST,
            residual_threshold=threshold,
            max_trials=trials,
            rng=np.random.default_rng(seed),
        )
    if model is None or inliers is None or inliers.sum() < _LEAST:
        return None, np.zeros(len(source), bool)
    return np.asarray(model.params, float), np.asarray(inliers, bool)


def _least_median(
    skimage: Any, source: np.ndarray, target: np.ndarray, trials: int, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    rng, best, median = np.random.default_rng(seed), None, np.inf
    for _ in range(trials):
        sample = rng.choice(len(source), _LEAST, replace=False)
        model = _fit(skimage, source[sample], target[sample])
        if model is None:
            continue
        value = float(np.median(_squared(model, source, target)))
        if value < median:
            best, median = model, value
    if best is None:
        return None, np.zeros(len(source), bool)
    spread = 2.5 * 1.4826 * (1 + 5 / max(len(source) - _LEAST, 1)) * np.sqrt(median)
    inliers = _squared(best, source, target) <= max(spread, 1e-3) ** 2
    model = _fit(skimage, source[inliers], target[inliers]) if inliers.sum() >= _LEAST else None
    model = best if model is None else model
    return np.asarray(model.params, float), inliers


def _fit(skimage: Any, source: np.ndarray, target: np.ndarray) -> Any:
    """A projective transform, None where points lie so that there is none."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        model = skimage.transform.ProjectiveTransform.from_estimate(source, target)
    return model if model and np.isfinite(model.params).all() else None


def _squared(model: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        error = ((model(source) - target) ** 2).sum(1)
    return np.where(np.isfinite(error), error, np.inf)


__all__ = ["Homography", "HomographyMethod", "find_homography"]
