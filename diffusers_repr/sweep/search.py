"""Sets of layers or levels, grown greedily: joint sums of what may be added, then one pass over `held` a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.closed_form import LinearPath
from diffusers_repr.metrics.gather import sum_over_processes
from diffusers_repr.sweep.grid import Grid
from diffusers_repr.sweep.linear import LinearSums, Scorer, comparable, fit_targets
from diffusers_repr.sweep.measure import Key, Piece, Tally, not_finite
from diffusers_repr.sweep.run import Sweep


class Addition(NamedTuple):
    """A unit that was added, and the set with it: its score, the penalty that gave it, the length of its features."""

    added: str
    score: float
    penalty: float
    dim: int


@dataclass(frozen=True)
class Greedy:
    """Greedy forward selection: add the unit that gains most, until the gain is below `tolerance`.

    Attributes:
        measure: How a set is scored.
        sweep: Reads the two splits.
        noise: Policy.
        seeds: Of the noise, by split.
        tolerance: Least gain.
    """

    measure: LinearSums
    sweep: Sweep
    noise: str
    seeds: Mapping[str, int]
    tolerance: float

    def grow(
        self,
        grid: Grid,
        units: Mapping[str, Sequence[Key]],
        start: Addition,
        most: int,
        cost: Callable[[str], Any],
        stage: str,
    ) -> list[Addition]:
        """What was added, the start first.

        One pass over `train` for the joint sums of all units, then one over `held` for each step.

        Args:
            grid: Layers and levels of the units.
            units: Name -> cells that come with it.
            start: The first unit, with its score.
            most: Largest number of units.
            cost: Sort key of a unit; of equal scores the smallest wins.
            stage: For the progress bar.
        """
        steps = [start]
        if most < 2 or len(units) < 2:
            return steps
        columns, total = self._columns(grid, [cell for unit in units.values() for cell in unit])
        index = {name: torch.cat([columns[cell] for cell in unit]) for name, unit in units.items()}
        bench = self.sweep.bench
        train, held = bench.splits["train"], bench.splits["held"]
        moments = self.measure.moments(total, 1, bench)

        def stream(role: str, use: Callable[[Tensor, Tensor], None]) -> None:
            self.sweep.expect(stage, [role], len(grid.levels))
            tally = _Joint(columns, total, self.measure.pooling, bench.device, use)
            self.sweep.read(grid, role, [tally], [self.measure.pooling], self.noise, self.seeds[role])

        stream("train", lambda at, matrix: moments.add(matrix, fit_targets(train, at)))
        moments.reduce(sum_over_processes)
        while len(steps) < min(most, len(units)):
            taken = [step.added for step in steps]
            fitted: dict[str, tuple[Tensor, LinearPath]] = {}
            for name in units:
                if name not in taken:
                    chosen = torch.cat([index[member] for member in (*taken, name)])
                    fitted[name] = (chosen, self.measure.fit(moments.take(chosen)))
            scorers = {name: self.measure.scorer(bench) for name in fitted}

            def predict(
                at: Tensor,
                matrix: Tensor,
                fitted: Mapping[str, tuple[Tensor, LinearPath]] = fitted,
                scorers: Mapping[str, Scorer] = scorers,
            ) -> None:
                for name, (chosen, path) in fitted.items():
                    scorers[name].add(path.predict(matrix[:, chosen.to(matrix.device)]), held.targets[at])

            stream("held", predict)
            scores = {
                name: scorer.best(self.measure.penalties, not_finite(name, grid.levels[0], held.name))
                for name, scorer in scorers.items()
            }
            best = min(scores, key=lambda name: (-comparable(scores[name][0]), cost(name)))
            gain = comparable(scores[best][0] - steps[-1].score)
            if gain < self.tolerance or gain <= 0:
                break
            steps.append(Addition(best, *scores[best], len(fitted[best][0])))
        return steps

    def _columns(self, grid: Grid, cells: Sequence[Key]) -> tuple[dict[Key, Tensor], int]:
        columns, total = {}, 0
        for cell in cells:
            dim = self.measure.dim(grid.layers[cell[1]])
            columns[cell] = torch.arange(total, total + dim)
            total += dim
        return columns, total


class _Joint(Tally):
    """Features of several cells side by side, a batch of images at a time: `use(at, matrix (n, total))`."""

    def __init__(
        self,
        columns: Mapping[Key, Tensor],
        total: int,
        pooling: str | None,
        device: torch.device,
        use: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.columns, self.total, self.pooling, self.device, self.use = columns, total, pooling, device, use
        self.matrix = torch.empty(0)

    def begin(self, role: str, at: Tensor, pixels: Tensor) -> None:
        self.matrix = torch.empty(len(at), self.total, device=self.device)

    def add(self, role: str, piece: Piece) -> None:
        for path, feature in piece.features[self.pooling].items():
            at = self.columns.get((piece.level, path))
            if at is not None:
                self.matrix[piece.part, int(at[0]) : int(at[-1]) + 1] = feature.to(self.device)

    def end(self, role: str, at: Tensor) -> None:
        self.use(at, self.matrix)
