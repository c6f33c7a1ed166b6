import importlib.metadata
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusers_repr.metrics import frechet_distance
from diffusers_repr.metrics.frechet import frechet_backend


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_scipy(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_scipy(dtype):
    x = randn(5000, 6, seed=1, dtype=dtype) @ randn(6, 6, seed=2, dtype=dtype)
    y = randn(300, 6, seed=3, dtype=dtype) * 2 + 1
    assert frechet_distance(x, y) == pytest.approx(by_scipy(x, y), rel=1e-7)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_closed_form_of_gaussians():
    """White samples, made exactly white, under diagonal maps: d^2 = |shift|^2 + sum((s - t)^2)."""
    white = randn(400, 4)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T)).T)
    s, t, shift = torch.tensor([[1.0, 2, 3, 0.5], [2.0, 2, 1, 0.1], [1.0, 0, -2, 0]], dtype=torch.float64)
    expected = float(shift.square().sum() + (s - t).square().sum())
    assert frechet_distance(white * s, white.flip(0) * t + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


def test_the_mean_costs_no_digits():
    x, y = randn(200, 3, seed=1), randn(200, 3, seed=2)
    assert frechet_distance(x + 1e7, y + 1e7) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_too_few_samples_are_told():
    with pytest.warns(UserWarning, match="5 samples for 8 features"):
        frechet_distance(randn(50, 8), randn(5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(randn(50, 8), randn(9, 8))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (randn(1, 2), randn(9, 2), "real has 1 rows"),
        (randn(9, 2), randn(9, 3), "use one encoder"),
        (randn(9, 2), randn(9, 2) * torch.nan, "rows of generated are not finite"),
        (randn(9, 2, 2), randn(9, 2), "Pool tokens"),
    ],
)
def test_bad_input(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


def test_backend_is_named():
    assert frechet_backend() == {"name": "torchmetrics", "version": importlib.metadata.version("torchmetrics")}
