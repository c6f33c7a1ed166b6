"""Area under the ROC curve of single numbers, and what of attributes they tell apart from one another (TAD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.metrics.checks import check_rows, working

CAPTURED, REDUNDANT = 0.75, 0.2


def area_under_roc(scores: Tensor, positive: Tensor) -> Tensor:
    """The share of pairs (positive, negative) in which the positive has the higher score, ties counted as half.

    That is the area under the ROC curve, exactly, from ranks.

    Args:
        scores: `(N, D)`, each column a score of its own.
        positive: `(N, K)` bool or of 0 and 1, each column an attribute with rows of both kinds.

    Returns:
        `(K, D)` float64 on the CPU: of every attribute and score.

    Raises:
        ValueError: For rows that do not fit, values that are neither 0 nor 1, an attribute that all rows share.

    Example:
        >>> area_under_roc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0], [0], [1], [1]]))
        tensor([[0.7500]], dtype=torch.float64)
    """
    check_rows(scores, "scores", least=2)
    truth = _binary(positive, len(scores))
    ranks = torch.stack([_mean_ranks(column) for column in scores.detach().cpu().double().T], 1)
    ones = truth.sum(0)
    zeros = len(truth) - ones
    lowest = ones * (ones + 1) / 2  # the sum of ranks of positives that stand below all else
    return (truth.T @ ranks - lowest[:, None]) / (ones * zeros)[:, None]


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _binary(positive: Tensor, rows: int) -> Tensor:
    if positive.ndim != 2 or len(positive) != rows:
        raise ValueError(f"positive is (N, K) with N = {rows}, a column an attribute; got {tuple(positive.shape)}.")
    truth = positive.detach().cpu().double()
    if not bool(((truth == 0) | (truth == 1)).all()):
        raise ValueError("positive holds 0 and 1 alone; bring numbers there by a threshold, classes by one-hot.")
    shared = ((truth == truth[0]).all(0)).nonzero().flatten().tolist()
    if shared:
        raise ValueError(f"Attributes {shared[:10]} are the same in all {rows} rows; nothing can be told apart.")
    return truth


@dataclass(frozen=True)
class AttributeDifference:
    """What `total_auroc_difference` found.

    Attributes:
        value: The sum over the captured attributes; 0 if there are none.
        captured: Names of the attributes that are counted.
        redundant: Names of those left out because another one tells them.
        areas: Of every attribute, by name: the area of each number of the code, the better of both directions `(D,)`.
        differences: Of every attribute: the best area less the second best.
    """

    value: float
    captured: tuple[str, ...]
    redundant: tuple[str, ...]
    areas: Mapping[str, Tensor]
    differences: Mapping[str, float]

    def __float__(self) -> float:
        return self.value


def total_auroc_difference(
    codes: Tensor,
    attributes: Mapping[str, Tensor],
    *,
    captured: float = CAPTURED,
    redundant: float = REDUNDANT,
) -> AttributeDifference:
    """TAD (Yeats et al. 2022, arXiv 2209.10677, section 4): is an attribute told by one number of the code alone?

    Each number is a detector of each attribute, in the better direction. An attribute is captured if its best detector
    has an area of `captured` at least; it adds by how much the second best is worse. Attributes of which another one
    takes away more than the share `redundant` of their entropy are left out. The sum grows with the number of
    attributes: compare codes on one list of them.

    Areas are exact; published code steps through 101 thresholds.

    Args:
        codes: `(N, D)`, two numbers at least; monotonous changes of one change nothing.
        attributes: Name -> `(N,)`, 0 or 1.
        captured: Least area of the best detector, 0.5 to 1.
        redundant: Largest share of its entropy that another attribute may take away.

    Raises:
        ValueError: As `area_under_roc`; for codes of one number, no attributes, or shares out of range.

    Example:
        >>> codes = torch.tensor([[0.0, 1.0], [0.1, 0.0], [0.9, 1.0], [1.0, 0.0]])
        >>> total_auroc_difference(codes, {"large": torch.tensor([0, 0, 1, 1])}).value
        0.5
    """
    check_rows(codes, "codes", least=2)
    if codes.shape[1] < 2:
        raise ValueError("TAD compares the two best numbers of a code; this code has one.")
    if not attributes:
        raise ValueError("TAD needs one attribute at least: name -> (N,) of 0 and 1.")
    for name, value, low in (("captured", captured, 0.5), ("redundant", redundant, 0.0)):
        if not low <= value <= 1:
            raise ValueError(f"{name} is {low:g} to 1; got {value!r}.")
    truth = torch.stack([torch.as_tensor(column).double().cpu() for column in attributes.values()], 1)
    areas = area_under_roc(working(codes), truth)
    areas = torch.maximum(areas, 1 - areas)
    best = areas.topk(2, dim=1).values
    repeated = entropy_taken(truth) > redundant
    counted = (best[:, 0] >= captured) & ~repeated
    gaps = best[:, 0] - best[:, 1]
    names = list(attributes)
    return AttributeDifference(
        float(gaps[counted].sum()),
        tuple(name for name, one in zip(names, counted.tolist(), strict=True) if one),
        tuple(name for name, one in zip(names, repeated.tolist(), strict=True) if one),
        dict(zip(names, areas, strict=True)),
        dict(zip(names, gaps.tolist(), strict=True)),
    )


def entropy_taken(truth: Tensor) -> Tensor:
    """Of each attribute, the largest share of its entropy that any other one takes away, `(K,)` float64.

    Args:
        truth: `(N, K)` of 0 and 1, columns with both.
    """
    count, attributes = truth.shape
    shares = truth.double().mean(0)
    entropy = -(torch.xlogy(shares, shares) + torch.xlogy(1 - shares, 1 - shares))
    both = truth.T.double() @ truth.double() / count
    mutual = torch.zeros(attributes, attributes, dtype=torch.float64)
    for one in (True, False):
        for other in (True, False):
            row, column = (shares if one else 1 - shares)[:, None], (shares if other else 1 - shares)[None]
            joint = both if one and other else shares[:, None] - both if one else shares[None] - both if other else (
                1 - shares[:, None] - shares[None] + both
            )  # fmt: skip
            joint = joint.clamp(min=0)  # of rounding
            mutual += torch.xlogy(joint, joint) - torch.xlogy(joint, row * column)
    mutual.fill_diagonal_(0)
    return mutual.amax(1) / entropy


__all__ = ["AttributeDifference", "area_under_roc", "entropy_taken", "total_auroc_difference"]
