"""Ridge regression on one-hot targets in closed form, and probabilities from its scores; float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.sums import Moments, ridge_path


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear classifier, in standardised features: `W (x - mean) / std + b`; all float64.

    Attributes:
        weight: `(K, D)`.
        bias: `(K,)`.
        mean: `(D,)`.
        std: `(D,)`.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """`(B, K)` float64 of features `(B, D)`."""
        return ((features.double() - self.mean) / self.std) @ self.weight.T + self.bias


def fit_ridge(
    features: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], rows: int = 4096
) -> list[LinearFit]:
    """Minimise `mean ||W z + b - onehot(y)||^2 + l2 ||W||^2` over standardised features z, for each penalty.

    Holds `D (D + K)` numbers besides the features; `diffusers_repr.heads.fitting.sums` has the sums for features that
    come batch by batch.

    Args:
        features: `(N, D)`.
        labels: `(N,)` class ids.
        num_classes: K.
        penalties: Values of l2, above 0; the bias has none.
        rows: Rows added to the sums at a time.
    """
    moments = Moments(features.shape[1], num_classes, device=features.device)
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        moments.add(x, torch.nn.functional.one_hot(y.to(x.device).long(), num_classes))
    path = ridge_path(moments, penalties)
    mean, inverse = path.mean[0], path.inverse_scale[0]
    std = torch.where(inverse > 0, 1 / inverse, torch.ones_like(inverse))
    fits = {}
    for at, l2 in enumerate(path.penalties):
        weight, bias = path.coefficients(at)
        fits[l2] = LinearFit(weight * std, bias + weight @ mean, mean, std)
    return [fits[float(l2)] for l2 in penalties]


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """The factor on logits `(N, K)` that makes their cross-entropy smallest, between 1e-3 and 1e3.

    Scores of a regression on one-hot targets lie near 0 and 1, so their softmax is almost flat; a factor makes
    probabilities of it and changes no prediction. The cross-entropy is convex in the factor; golden-section search.
    """
    logits, labels = logits.double(), labels.to(logits.device).long()

    def loss(log_factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits * 10**log_factor, labels))

    low, high, ratio = -3.0, 3.0, (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return 10 ** ((low + high) / 2)
