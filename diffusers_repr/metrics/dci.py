"""Disentanglement and completeness of a code, from how much each of its numbers matters for each attribute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImportanceScores(NamedTuple):
    """Both are 0 to 1.

    Attributes:
        disentanglement: Does each number matter for one attribute alone?
        completeness: Does one number alone matter for each attribute?
    """

    disentanglement: float
    completeness: float


def importance_scores(importance: Tensor) -> ImportanceScores:
    """The two scores of Eastwood and Williams 2018 (ICLR, "A framework for the quantitative evaluation ...").

    With `P` the rows of importances scaled to sum to 1, number i has `D_i = 1 - H_K(P_i)`, the entropy in base K, and
    counts by its share of all importance; completeness is the same of the columns, in base D (section 2).

    Args:
        importance: `(D, K)`, not negative: of each of D numbers for each of K attributes.

    Raises:
        ValueError: For fewer than two numbers or attributes, negative or no importance.

    Example:
        >>> importance_scores(torch.eye(3))
        ImportanceScores(disentanglement=1.0, completeness=1.0)
        >>> importance_scores(torch.ones(2, 4))
        ImportanceScores(disentanglement=0.0, completeness=0.0)
    """
    if importance.ndim != 2 or min(importance.shape) < 2:
        raise ValueError(
            f"importance is (numbers, attributes), two of each at least; got {tuple(importance.shape)}: an entropy in "
            "base 1 is none."
        )
    values = importance.detach().double().cpu()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("importance holds finite numbers from 0; take the absolute value of weights.")
    if not bool(values.sum() > 0):
        raise ValueError("No number matters for any attribute: the code tells none of them, and there is no score.")
    return ImportanceScores(_weighted(values), _weighted(values.T))


def _weighted(values: Tensor) -> float:
    """Mean over rows of 1 - H, by their share of all importance."""
    sums = values.sum(1)
    shares = values / sums.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    entropy = -torch.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(float(values.shape[1])).double())
    return float(((1 - entropy) * sums).sum() / sums.sum())


__all__ = ["ImportanceScores", "importance_scores"]
