"""Precision and recall of generated samples, by manifolds of nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.checks import check_rows, working

_BLOCK = 2**24  # distances that are held at a time


class PrecisionRecall(NamedTuple):
    """Both shares, 0 to 1.

    Attributes:
        precision: Share of generated samples that lie in the manifold of the real ones: are they good?
        recall: Share of real samples that lie in the manifold of the generated ones: is everything there?
    """

    precision: float
    recall: float


def precision_recall(
    real: Tensor,
    generated: Tensor,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    block_rows: int | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    The manifold of a set is the union of balls around its samples, each with the distance to its k-th nearest other
    sample as radius, the border included. Shares grow with k and depend on both counts: compare equal ones.

    Args:
        real: `(N, D)` features.
        generated: `(M, D)`.
        k: Neighbour that sets the radius, 1 to the smaller count less 1; the paper's is 3.
        dtype: Of distances. Float32 is faster and tells points near a border wrong now and then.
        block_rows: Rows compared at a time; by a limit on memory if None.

    Raises:
        ValueError: For k out of range, unequal D, or NaN.

    Example:
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> precision_recall(x, x[:20])
        PrecisionRecall(precision=1.0, recall=...)
    """
    check_rows(real, "real", least=2)
    check_rows(generated, "generated", least=2)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real has {real.shape[1]} features and generated has {generated.shape[1]}; use one encoder.")
    check_whole("k", k, 1, min(len(real), len(generated)) - 1)
    shift = working(real, dtype).mean(0)
    x, y = (working(values.to(shift.device) - shift, dtype) for values in (real, generated))
    step = max(_BLOCK // max(len(x), len(y)), 1) if block_rows is None else check_whole("block_rows", block_rows, 1)
    of_real, of_generated = (_squared_radii(values, k, step) for values in (x, y))
    good = _covered(y, x, of_real, step)
    there = _covered(x, y, of_generated, step)
    return PrecisionRecall(float(good.double().mean()), float(there.double().mean()))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`(n, m)`; products of matrices, hence not below rounding."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp(min=0)


def _squared_radii(x: Tensor, k: int, step: int) -> Tensor:
    """Squared distance `(n,)` of every row to its k-th nearest other row."""
    radii = []
    for start in range(0, len(x), step):
        squared = _squared_distances(x[start : start + step], x)
        at = torch.arange(len(squared), device=x.device)
        squared[at, start + at] = torch.inf
        radii.append(squared.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, squared_radii: Tensor, step: int) -> Tensor:
    """Whether each row of `points` lies in any of the balls, `(n,)`."""
    return torch.cat([(_squared_distances(rows, centres) <= squared_radii).any(1) for rows in points.split(step)])
