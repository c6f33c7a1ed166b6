"""Ridge regression on one-hot targets from sums: one pass over the features, none kept, float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


class RidgeSums:
    """Sums from which ridge regression is solved for any penalty.

    Memory is `D (D + K)` numbers, however many rows are added. Sums are taken about the first batch's mean, so that
    features far from zero lose no digits.

    Args:
        in_features: D.
        num_classes: K.
        device: Where the sums are kept.

    Example:
        >>> sums = RidgeSums(2, 2)
        >>> sums.update(torch.eye(2), torch.tensor([0, 1]))
        >>> sums.solve(1e-6).logits(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """

    def __init__(self, in_features: int, num_classes: int, device: str | torch.device | None = None) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.x = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.y = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.xx = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.xy = torch.zeros(in_features, num_classes, dtype=torch.float64, device=device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: `(B, D)`.
            labels: `(B,)` class ids.
        """
        x = features.to(self.x.device).double()
        if self.shift is None:
            self.shift = x.mean(0)
        x = x - self.shift
        y = torch.nn.functional.one_hot(labels.to(self.x.device).long(), len(self.y)).double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, l2: float, standardize: bool = True) -> LinearFit:
        """Minimise `mean ||W z + b - onehot(y)||^2 + l2 ||W||^2` with `z` the standardised features.

        Args:
            l2: Penalty; the bias has none.
            standardize: False takes the features as they are (mean 0, std 1 in the result).

        Raises:
            ValueError: If no rows were added, or l2 is negative.
        """
        return self.solve_all([l2], standardize)[0]

    def solve_all(self, penalties: Sequence[float], standardize: bool = True) -> list[LinearFit]:
        """As `solve`, for several penalties by one eigendecomposition."""
        if self.count == 0 or self.shift is None:
            raise ValueError("No rows were added; call `update` first.")
        if any(l2 < 0 for l2 in penalties):
            raise ValueError(f"l2 must be at least 0; got {list(penalties)}.")
        mean, share = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean, mean)
        cross = self.xy / self.count - torch.outer(mean, share)
        variance = covariance.diagonal().clamp(min=0)
        # A constant feature's variance is rounding noise of its mean and of the sums.
        flat = variance <= 1e-13 * self.xx.diagonal() / self.count + (1e-15 * self.shift) ** 2
        std = torch.where(flat, torch.ones_like(variance), variance.sqrt())
        center = mean + self.shift
        if not standardize:
            std, center_out = torch.ones_like(std), torch.zeros_like(center)
        else:
            center_out = center
        values, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
        rotated = vectors.T @ (cross / std[:, None])
        floor = values.clamp(min=0).max() * 1e-13
        fits = []
        for l2 in penalties:
            scale = values.clamp(min=0) + l2
            inverse = torch.where(scale > floor, 1 / scale, torch.zeros_like(scale))
            weight = (vectors @ (inverse[:, None] * rotated)).T
            bias = share if standardize else share - weight @ center
            fits.append(LinearFit(weight, bias, center_out, std))
        return fits


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
