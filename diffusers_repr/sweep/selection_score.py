"""Scores of linear models over a grid of penalties, added up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Scorer:
    """Adds up what a metric needs, for every penalty at once.

    Args:
        metric: `accuracy`, `balanced_accuracy` (mean over the classes that occur), `neg_brier` (minus the squared
            distance to the one-hot label, mean over rows), `r2` (mean over targets) or `neg_mse`.
        penalties: Number of penalties P.
        columns: Number of classes, or of targets, K.
    """

    def __init__(self, metric: str, penalties: int, columns: int) -> None:
        self.metric = metric
        self.seen = torch.zeros(columns, dtype=torch.float64)
        self.hits = torch.zeros(penalties, columns, dtype=torch.float64)  # or squared errors
        self.sums = torch.zeros(2, columns, dtype=torch.float64)  # of values and their squares
        self.finite = True

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add rows: outputs `(P, n, K)`; targets: class indices `(n,)` or values `(n, K)`."""
        self.finite &= bool(torch.isfinite(outputs).all())
        if self.metric == "neg_brier":
            labels = torch.nn.functional.one_hot(targets, len(self.seen))
            self.hits += ((outputs.cpu() - labels) ** 2).sum(1)
            self.seen += torch.bincount(targets, minlength=len(self.seen))
        elif targets.ndim == 1:
            right = (outputs.argmax(2).cpu() == targets).double()
            self.hits.index_add_(1, targets, right)
            self.seen += torch.bincount(targets, minlength=len(self.seen))
        else:
            self.hits += ((outputs.cpu() - targets) ** 2).sum(1)
            self.seen += len(targets)
            self.sums += torch.stack([targets.sum(0), (targets**2).sum(0)])

    def scores(self) -> Tensor:
        """`(P,)`, larger is better."""
        if self.metric == "accuracy":
            return self.hits.sum(1) / self.seen.sum()
        if self.metric == "balanced_accuracy":
            present = self.seen > 0
            return (self.hits[:, present] / self.seen[present]).mean(1)
        if self.metric == "neg_brier":
            return -self.hits.sum(1) / self.seen.sum()
        mse = self.hits / self.seen
        if self.metric == "neg_mse":
            return -mse.mean(1)
        variance = self.sums[1] / self.seen - (self.sums[0] / self.seen) ** 2
        return (1 - mse / variance).mean(1)

    def best(self) -> tuple[float, int]:
        """`(score, index of the penalty)`; equal scores go to the larger penalty."""
        scores = self.scores().tolist()
        top = max(scores, key=comparable)
        at = max(at for at, score in enumerate(scores) if comparable(score) == comparable(top))
        return scores[at], at


def comparable(score: float) -> float:
    """The score without its rounding errors, so that equal ones compare equal."""
    return round(score, 12)
