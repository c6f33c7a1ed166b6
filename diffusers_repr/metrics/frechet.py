"""Fréchet distance between two sets of features, computed by torchmetrics."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.metrics.checks import check_rows, working

_ROWS = 4096  # rows that are added at a time


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to both sets (Heusel et al. 2017, arXiv 1706.08500).

    `||mu_r - mu_g||^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))`, by torchmetrics' `FrechetInceptionDistance` in float64;
    with features of Inception it is FID. It falls with the number of samples by a share of about 1 / N: compare
    numbers of equal counts, one set of features and one implementation only (see `MetricRecord`).

    Args:
        real: `(N, D)`.
        generated: `(M, D)`.

    Returns:
        0 for equal sets, up to rounding.

    Raises:
        ImportError: Without torchmetrics; names the extra.
        ValueError: For fewer than 2 rows, unequal D, or NaN.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + 2), 6)
        12.0
    """
    check_rows(real, "real", least=2)
    check_rows(generated, "generated", least=2)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real has {real.shape[1]} features and generated has {generated.shape[1]}; use one encoder.")
    smaller = min(len(real), len(generated))
    if smaller <= real.shape[1]:
        warnings.warn(
            f"{smaller} samples for {real.shape[1]} features: the covariance is singular, and the distance is mostly "
            "that of too few samples. Take more of them, or features of lower dimension.",
            stacklevel=2,
        )
    # Its covariance is a difference of raw moments; without the mean of the features no digits are lost.
    shift = working(real, torch.float64).mean(0)
    metric = _metric(real.shape[1]).to(shift.device)
    with torch.no_grad():
        for values, is_real in ((real, True), (generated, False)):
            for rows in values.split(_ROWS):
                metric.update(rows.to(shift.device).double() - shift, real=is_real)
        return float(metric.compute())


def frechet_backend() -> dict[str, str]:
    """Name and version of the package that computes the distance.

    Raises:
        ImportError: Without torchmetrics; names the extra.
    """
    _frechet_class()
    return {"name": "torchmetrics", "version": version("torchmetrics")}


class _Given(nn.Module):
    """Features as they are, in the form that torchmetrics asks for."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _frechet_class() -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError('The Fréchet distance needs torchmetrics: pip install "diffusers-repr[eval]"') from error
    return FrechetInceptionDistance


def _metric(num_features: int) -> Any:
    # Every process holds all features by now; its own sum over processes would count them several times.
    return _frechet_class()(feature=_Given(num_features), sync_on_compute=False)
