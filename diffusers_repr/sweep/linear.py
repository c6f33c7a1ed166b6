"""Linear heads in closed form from sums that grow batch by batch: accuracy of every cell, no feature stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.denoiser import Layer
from diffusers_repr.features.pooling import pooled_size
from diffusers_repr.heads.fitting.closed_form import CRITERIA, PENALTIES, LinearPath, Moments, check_penalties
from diffusers_repr.metrics.gather import sum_over_processes
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.measure import (
    Bench,
    CellScore,
    Key,
    Measure,
    Piece,
    Split,
    Tally,
    not_finite,
    register_measure,
)

VALUE_METRICS = ("r2", "neg_mse")  # of numbers as targets


@register_measure("accuracy", "balanced_accuracy", "neg_brier", *VALUE_METRICS)
@dataclass(frozen=True)
class LinearSums(Measure):
    """Of a linear head fitted in closed form on `train`: `name` is its metric on `held`, see `Scorer`.

    The best over a grid of penalties. Targets are class indices `(n,)`, or values `(n, K)`.
    """

    criterion: str = "ridge"
    penalties: tuple[float, ...] = PENALTIES

    def __post_init__(self) -> None:
        """The grid in ascending order; maps have to be pooled."""
        pooled_size(self.pooling)
        object.__setattr__(self, "penalties", check_penalties(self.penalties))

    def check(self, bench: Bench) -> None:
        """Refuse what the metric does not measure."""
        if self.criterion not in CRITERIA:
            raise ValueError(f"Unknown criterion {self.criterion!r}; expected one of {', '.join(CRITERIA)}.")
        if self.name == "neg_brier" and self.criterion != "ridge":
            raise ValueError(f"metric='neg_brier' measures the ridge's own loss; got criterion={self.criterion!r}.")

    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Of the float64 sums."""
        return self.bytes_of_sums(self.dim(layer), bench)

    def bytes_of_sums(self, dim: int, bench: Bench) -> int:
        """Of the sums of one feature of this length."""
        return 8 * dim * (dim + 1 + columns_of(bench.splits["train"]))

    def moments(self, dim: int, levels: int, bench: Bench) -> Moments:
        """Empty sums of features of this length."""
        return Moments(dim, columns_of(bench.splits["train"]), levels, bench.device)

    def fit(self, moments: Moments) -> LinearPath:
        """A head for every penalty."""
        return CRITERIA[self.criterion](moments, self.penalties)

    def scorer(self, bench: Bench) -> Scorer:
        """Of one head for every penalty."""
        return Scorer(self.name, len(self.penalties), columns_of(bench.splits["train"]))

    def tally(self, grid: SweepGrid, bench: Bench) -> Tally:
        """Sums over `train`, then hits over `held`."""
        return _SumsTally(self, grid, bench)


def columns_of(split: Split) -> int:
    """Classes, or values of a target."""
    return int(split.targets.max()) + 1 if split.targets.ndim == 1 else int(split.targets.shape[1])


def fit_targets(split: Split, at: Tensor) -> Tensor:
    """Targets of a linear fit `(n, K)` float64 of some images: one-hot, or the values."""
    targets = split.targets[at]
    return targets if targets.ndim > 1 else torch.nn.functional.one_hot(targets, columns_of(split)).double()


class _SumsTally(Tally):
    def __init__(self, measure: LinearSums, grid: SweepGrid, bench: Bench) -> None:
        self.measure, self.grid, self.bench = measure, grid, bench
        levels = len(grid.levels)
        self.moments = {path: measure.moments(measure.dim(x), levels, bench) for path, x in grid.layers.items()}
        self.fitted: Mapping[str, LinearPath] = {}
        self.scorers: dict[Key, Scorer] = {}

    def add(self, role: str, piece: Piece) -> None:
        split, features = self.bench.splits[role], piece.features[self.measure.pooling]
        if role == "train":
            targets = fit_targets(split, piece.at)
            for path, feature in features.items():
                self.moments[path].add(feature, targets, piece.level)
            return
        for path, feature in features.items():
            predicted = self.fitted[path].predict(feature, piece.level)
            self.scorers[piece.level, path].add(predicted, split.targets[piece.at])

    def close(self, role: str) -> None:
        if role != "train":
            return
        for path, moments in self.moments.items():
            moments.reduce(sum_over_processes)
            for at, level in enumerate(self.grid.levels):
                if not moments.finite(at):
                    raise not_finite(path, level, self.bench.splits["train"].name)
        self.fitted = {path: self.measure.fit(self.moments.pop(path)) for path in self.grid.layers}
        cells = [(at, path) for at in range(len(self.grid.levels)) for path in self.grid.layers]
        self.scorers = {cell: self.measure.scorer(self.bench) for cell in cells}

    def scores(self) -> dict[Key, dict[str, CellScore]]:
        found, penalties, held = {}, self.measure.penalties, self.bench.splits["held"].name
        for (at, path), scorer in self.scorers.items():
            best = scorer.best(penalties, not_finite(path, self.grid.levels[at], held))
            found[at, path] = {self.measure.name: CellScore(*best)}
        return found


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

    def best(self, penalties: Sequence[float], broken: Exception) -> tuple[float, float]:
        """The best score over the rows of all processes, and its penalty; `broken` is raised for NaN and infinities.

        Equal scores go to the larger penalty.
        """
        bad = torch.tensor(not self.finite).double()
        self.seen, self.hits, self.sums, bad = map(sum_over_processes, (self.seen, self.hits, self.sums, bad))
        if bool(bad):
            raise broken
        scores = self.scores().tolist()
        top = comparable(max(scores, key=comparable))
        at = max(at for at, score in enumerate(scores) if comparable(score) == top)
        return scores[at], penalties[at]


def comparable(score: float) -> float:
    """The score without its rounding errors, so that equal ones compare equal."""
    return round(score, 12)
