"""What paired differences of errors say: evidence against equality at any time, and confidence in a winner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Differences of errors that are smaller, as a share of the errors, are float32's rounding.
NOTHING = 1e-6
_TOGETHER = 16  # images in one array of all pairs of units


def log_evidence(total: Tensor, squares: Tensor, rounds: int | Tensor, effect: float) -> Tensor:
    """Logarithm of the evidence against a mean of zero, of normal differences with unknown variance.

    With `T` the sum and `V` the sum of the squares of n differences and `c = 1 / effect^2`,
    `E_n = sqrt(c / (n + c)) (1 - T^2 / ((n + c) V))^(-n / 2)`: the likelihood ratio of the t statistic, mixed over a
    normal prior of the effect size. Under a mean of zero it is a martingale that starts at 1, whatever the variance,
    so it passes `1 / a` at any time with a probability of at most `a` (Ville). Wang and Ramdas 2024 (arXiv
    2310.03722).

    Args:
        total: T, any shape.
        squares: V, the same shape; where it is 0 the differences say nothing and the evidence is 1.
        rounds: n, one for all or the shape of T.
        effect: Standard deviation of the prior of mean over standard deviation of a difference. Any value is right;
            a good guess makes races short.

    Example:
        >>> one = torch.tensor([2.0], dtype=torch.float64)
        >>> log_evidence(one, one.square(), 1, 1.0).abs() < 1e-12
        tensor([True])
    """
    n, c = torch.as_tensor(rounds, dtype=total.dtype), 1 / effect**2
    # T^2 <= n V, but for rounding
    share = torch.where(squares > 0, total.square() / ((n + c) * squares), 0.0).minimum(n / (n + c))
    value = 0.5 * torch.log(c / (n + c)) - 0.5 * n * torch.log1p(-share)
    return torch.where(squares > 0, value, 0.0)


def confidence(rounds: Tensor, classes: Tensor, labels: Tensor, effect: float = 1.0) -> Tensor:
    """How sure the pairs make it that no other class has a lower expected error than the winner, `(N,)` in [0, 1].

    It is 1 minus the largest p-value of "this unit is the best" over the units of other classes. That of a unit is
    `(U - 1) / (2 E)`, E being the largest evidence for one that is better, of the rounds both were in: valid whenever
    one stops, for normal differences that are alike from round to round (see `Racing`; where rounds are other levels
    it is a guide). It is not the probability that the image is of the class.

    Args:
        rounds: Error of each unit in each round, `(N, U, R)`, NaN where it was not in it.
        classes: Class of each unit, `(U,)`.
        labels: The winner's class, `(N,)`.
        effect: See `log_evidence`.
    """
    here, filled = rounds.isfinite().double(), rounds.nan_to_num(0.0)
    found = [
        _sure(*part, classes, effect)
        for part in zip(here.split(_TOGETHER), filled.split(_TOGETHER), labels.split(_TOGETHER), strict=True)
    ]
    return torch.cat(found)


def _sure(here: Tensor, filled: Tensor, labels: Tensor, classes: Tensor, effect: float) -> Tensor:
    """Sums over the rounds that two units were both in, without an array of all pairs and rounds."""
    square = filled.square()
    both = here @ here.mT
    total = filled @ here.mT - here @ filled.mT
    sums = square @ here.mT + here @ square.mT
    squares = sums - 2 * filled @ filled.mT
    squares = squares.where(squares > NOTHING**2 * sums, 0.0)
    evidence = log_evidence(total, squares, both.clamp(min=1), effect).masked_fill(total <= 0, 0.0)
    best = evidence.amax(2).masked_fill(classes == labels[:, None], torch.inf)
    p = torch.exp(math.log(max(len(classes) - 1, 1) / 2) - best).clamp(max=1)
    return 1 - p.amax(1)


__all__ = ["NOTHING", "confidence", "log_evidence"]
