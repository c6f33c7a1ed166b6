"""What paired differences of errors say: evidence against equality at any time, and confidence in a winner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Differences of errors that are smaller, as a share of the errors, are float32's rounding.
NOTHING = 1e-6


def log_evidence(total: Tensor, squares: Tensor, rounds: int, effect: float) -> Tensor:
    """Logarithm of the evidence against a mean of zero, of normal differences with unknown variance.

    With `T` the sum and `V` the sum of the squares of n differences and `c = 1 / effect^2`,
    `E_n = sqrt(c / (n + c)) (1 - T^2 / ((n + c) V))^(-n / 2)`: the likelihood ratio of the t statistic, mixed over a
    normal prior of the effect size. Under a mean of zero it is a martingale that starts at 1, whatever the variance,
    so it passes `1 / a` at any time with a probability of at most `a` (Ville). Wang and Ramdas 2024 (arXiv
    2310.03722).

    Args:
        total: T, any shape.
        squares: V, the same shape; where it is 0 the differences say nothing and the evidence is 1.
        rounds: n.
        effect: Standard deviation of the prior of mean over standard deviation of a difference. Any value is right;
            a good guess makes races short.

    Example:
        >>> one = torch.tensor([2.0], dtype=torch.float64)
        >>> log_evidence(one, one.square(), 1, 1.0).abs() < 1e-12
        tensor([True])
    """
    c = 1 / effect**2
    most = rounds / (rounds + c)  # T^2 <= n V, but for rounding
    share = torch.where(squares > 0, total.square() / ((rounds + c) * squares), 0.0).clamp(max=most)
    value = 0.5 * math.log(c / (rounds + c)) - 0.5 * rounds * torch.log1p(-share)
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
    found = torch.empty(len(rounds), dtype=torch.float64)
    for at, (values, label) in enumerate(zip(rounds, labels.tolist(), strict=True)):
        here = values.isfinite()
        both = (here[:, None] & here[None, :]).sum(-1)
        filled = values.nan_to_num(0.0)
        own = here.double()
        # Sums over the rounds both were in, without an array of all pairs and rounds.
        total = filled @ own.T - own @ filled.T
        square = filled.square()
        sums = square @ own.T + own @ square.T
        squares = sums - 2 * filled @ filled.T
        squares = squares.where(squares > NOTHING**2 * sums, 0.0)
        evidence = _evidence(total, squares, both, effect).masked_fill(total <= 0, 0.0)
        best = evidence.amax(1)[classes != label]
        p = torch.exp(math.log(max(len(classes) - 1, 1) / 2) - best).clamp(max=1)
        found[at] = 1 - p.amax()
    return found


def _evidence(total: Tensor, squares: Tensor, rounds: Tensor, effect: float) -> Tensor:
    found = torch.zeros_like(total)
    for count in rounds.unique().tolist():
        own = rounds == count
        if count:
            found[own] = log_evidence(total[own], squares[own], count, effect)
    return found


__all__ = ["NOTHING", "confidence", "log_evidence"]
