"""Sets of layers or levels, grown greedily: joint sums of what may be added, then one pass over `held` a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.closed_form import LinearPath
from diffusers_repr.metrics.gather import sum_over_processes
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.linear import LinearSums, Scorer, comparable, fit_targets
from diffusers_repr.sweep.measure import Key, Piece, Tally, not_finite
from diffusers_repr.sweep.run import Sweep

_Heads = Mapping[str, tuple[Tensor, LinearPath, Scorer]]


class Addition(NamedTuple):
    """A unit that was added, and the set with it: its score, the penalty that gave it, the length of its features."""

    added: str
    score: float
    penalty: float
    dim: int


def grow(
    sweep: Sweep,
    grid: SweepGrid,
    units: Mapping[str, Sequence[Key]],
    start: Addition,
    most: int,
    cost: Callable[[str], Any],
    stage: str,
    *,
    noise: str,
    seeds: Mapping[str, int],
    tolerance: float,
) -> list[Addition]:
    """Greedy forward selection: add the unit that gains most, until the gain is below `tolerance`; the start first.

    One pass over `train` for the joint sums of all units, then one over `held` for each step.

    Args:
        sweep: Its one measure is a `LinearSums`, by which sets are scored.
        grid: Layers and levels of the units.
        units: Name -> cells that come with it.
        start: The first unit, with its score.
        most: Largest number of units.
        cost: Sort key of a unit; of equal scores the smallest wins.
        stage: For the progress bar.
        noise: Policy.
        seeds: Of the noise, by split.
        tolerance: Least gain.
    """
    steps = [start]
    if most < 2 or len(units) < 2:
        return steps
    measure, bench = sweep.measures[0], sweep.bench
    assert isinstance(measure, LinearSums)
    columns: dict[Key, Tensor] = {}
    total = 0
    for cell in (cell for unit in units.values() for cell in unit):
        columns[cell] = torch.arange(total, total := total + measure.dim(grid.layers[cell[1]]))
    index = {name: torch.cat([columns[cell] for cell in unit]) for name, unit in units.items()}
    train, held = bench.splits["train"], bench.splits["held"]
    moments = measure.moments(total, 1, bench)

    def stream(role: str, use: Callable[[Tensor, Tensor], None]) -> None:
        sweep.expect(stage, [role], len(grid.levels))
        tally = JointTally(columns, total, measure.pooling, bench.device, use)
        sweep.read(grid, role, [tally], [measure.pooling], noise, seeds[role])

    stream("train", lambda at, matrix: moments.add(matrix, fit_targets(train, at)))
    moments.reduce(sum_over_processes)
    while len(steps) < min(most, len(units)):
        taken = [step.added for step in steps]
        rest = {name: torch.cat([index[m] for m in (*taken, name)]) for name in units if name not in taken}
        heads = {
            name: (chosen, measure.fit(moments.take(chosen)), measure.scorer(bench)) for name, chosen in rest.items()
        }

        def score(at: Tensor, matrix: Tensor, heads: _Heads = heads) -> None:
            for chosen, path, scorer in heads.values():
                scorer.add(path.predict(matrix[:, chosen.to(matrix.device)]), held.targets[at])

        stream("held", score)
        broken = {name: not_finite(name, grid.levels[0], held.name) for name in heads}
        scores = {name: scorer.best(measure.penalties, broken[name]) for name, (_, _, scorer) in heads.items()}
        best = min(scores, key=lambda name: (-comparable(scores[name][0]), cost(name)))
        gain = comparable(scores[best][0] - steps[-1].score)
        if gain < tolerance or gain <= 0:
            break
        steps.append(Addition(best, *scores[best], len(rest[best])))
    return steps


class JointTally(Tally):
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
        """Room for the images of a batch."""
        self.matrix = torch.empty(len(at), self.total, device=self.device)

    def add(self, role: str, piece: Piece) -> None:
        """Put the features of a level into their columns."""
        for path, feature in piece.features[self.pooling].items():
            at = self.columns.get((piece.level, path))
            if at is not None:
                self.matrix[piece.part, int(at[0]) : int(at[-1]) + 1] = feature.to(self.device)

    def end(self, role: str, at: Tensor) -> None:
        """Hand the batch on."""
        self.use(at, self.matrix)
