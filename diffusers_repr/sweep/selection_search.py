"""The search of a selection: scores of all cells, then greedy sets; two streaming passes each, sums in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.features.noise_policy import validation_seed
from diffusers_repr.heads.fitting.sums import CRITERIA, LinearPath, Moments
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.selection_data import Task
from diffusers_repr.sweep.selection_read import Reader
from diffusers_repr.sweep.selection_score import Scorer, comparable

Key = tuple[int, str]  # (index of the level, layer path)
Block = tuple[int, str]


@dataclass(frozen=True)
class Step:
    """One unit that greedy selection took.

    Attributes:
        added: Name of the unit.
        score: Of the set with it.
        penalty: That gave the score.
        dim: Length of the set's features.
    """

    added: str
    score: float
    penalty: float
    dim: int


@dataclass(frozen=True)
class Search:
    """One task, one model, one criterion.

    Attributes:
        task: Both splits.
        reader: Makes features.
        criterion: One of `CRITERIA`.
        penalties: Grid, ascending.
        memory: Bytes that the sums may take.
        device: Where sums are kept and solved.
    """

    task: Task
    reader: Reader
    criterion: str
    penalties: tuple[float, ...]
    memory: int
    device: torch.device

    def bytes_of(self, dim: int) -> int:
        """Bytes of the sums of one feature of this length."""
        return 8 * dim * (dim + 1 + self.task.columns)

    # Every cell by itself

    def score_cells(
        self, levels: Sequence[NoiseLevel], noise: str, seed: int, paths: Sequence[str], stage: str
    ) -> dict[Key, tuple[float, float]]:
        """`(score, penalty)` of every level and layer: two passes over the images for each group of levels.

        All levels are one group unless their sums would pass `memory`.

        Raises:
            ValueError: If the sums of a single level pass `memory`.
        """
        size = self.group_size(paths)
        groups = [range(at, min(at + size, len(levels))) for at in range(0, len(levels), size)]
        for group in groups:
            passes = (self.task.train, self.task.validation)
            self.reader.progress.expect(stage, sum(self.reader.forwards(data, len(group)) for data in passes))
        scores = {}
        for group in groups:
            found = self._score_group([levels[at] for at in group], noise, seed, paths)
            scores.update({(group[at], path): value for (at, path), value in found.items()})
        return scores

    def group_size(self, paths: Sequence[str]) -> int:
        """Levels whose sums fit in `memory` together."""
        dims = {path: self.reader.dim(path) for path in paths}
        need = sum(self.bytes_of(dim) for dim in dims.values())
        if need > self.memory:
            widest = max(dims, key=lambda path: dims[path])
            raise ValueError(
                f"The sums of one level need {need / 2**30:.3g} GiB for {len(dims)} layers (the widest, {widest!r}, "
                f"has {dims[widest]} features), more than memory_gib={self.memory / 2**30:.3g}. Pass fewer layers, a "
                "smaller pooling, or a larger memory_gib."
            )
        return self.memory // need

    def _score_group(
        self, levels: Sequence[NoiseLevel], noise: str, seed: int, paths: Sequence[str]
    ) -> dict[Key, tuple[float, float]]:
        columns = self.task.columns
        moments = {p: Moments(self.reader.dim(p), columns, len(levels), self.device) for p in paths}
        for side, at, features in self._rows(self.task.train, levels, noise, seed, paths):
            for path, feature in features.items():
                moments[path].add(feature, side, at)
        for path, sums in moments.items():
            for at, level in enumerate(levels):
                if not sums.finite(at):
                    raise _not_finite(path, level, self.task.train)
        fitted = {path: CRITERIA[self.criterion](moments.pop(path), self.penalties) for path in paths}
        scorers = {
            (at, path): Scorer(self.task.metric, len(self.penalties), columns)
            for at in range(len(levels))
            for path in paths
        }
        for targets, at, features in self._rows(self.task.validation, levels, noise, seed, paths, side=False):
            for path, feature in features.items():
                scorers[at, path].add(fitted[path].predict(feature, at), targets)
        self.reader.overlap.tell(self.task.train, self.task.validation)
        return {(at, path): self._best(s, path, levels[at]) for (at, path), s in scorers.items()}

    def _rows(
        self,
        data: Labelled,
        levels: Sequence[NoiseLevel],
        noise: str,
        seed: int,
        paths: Sequence[str],
        side: bool = True,
    ) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
        targets = self.task.side(data) if side else data.targets
        seed = validation_seed(noise, seed) if data is self.task.validation else seed
        for rows, stream in self.reader.read(data, levels, noise, seed, paths):
            for level, part, features in stream:
                yield targets[rows][part], level, features

    def _best(self, scorer: Scorer, what: str, level: NoiseLevel) -> tuple[float, float]:
        if not scorer.finite:
            raise _not_finite(what, level, self.task.validation)
        score, at = scorer.best()
        return score, self.penalties[at]

    # Sets of cells, side by side

    def grow(
        self,
        units: Mapping[str, Sequence[Block]],
        start: Step,
        levels: Sequence[NoiseLevel],
        noise: str,
        seed: int,
        most: int,
        tolerance: float,
        cost: Callable[[str], Any],
        stage: str,
    ) -> list[Step]:
        """Greedy forward selection: add the unit that gains most, until the gain is below `tolerance`.

        One pass over train for the joint sums of all units, then one over validation for each step.

        Args:
            units: Name -> blocks (features of a level and layer) that come with it.
            start: The first unit, with its score.
            levels: What the blocks' indices mean.
            noise: Policy.
            seed: Of the noise.
            most: Largest number of units.
            tolerance: Least gain.
            cost: Sort key of a unit; of equal scores the smallest wins.
            stage: For the progress bar.
        """
        steps = [start]
        if most < 2 or len(units) < 2:
            return steps
        columns, total = self._columns([block for unit in units.values() for block in unit])
        index = {name: torch.cat([columns[block] for block in unit]) for name, unit in units.items()}
        self.reader.progress.expect(stage, self.reader.forwards(self.task.train, len(levels)))
        moments = Moments(total, self.task.columns, 1, self.device)
        for side, matrix in self._joined(self.task.train, columns, total, levels, noise, seed, side=True):
            moments.add(matrix, side)
        while len(steps) < min(most, len(units)):
            taken = [step.added for step in steps]
            fitted = {}
            for name in units:
                if name not in taken:
                    chosen = torch.cat([index[member] for member in (*taken, name)])
                    fitted[name] = (chosen, CRITERIA[self.criterion](moments.take(chosen), self.penalties))
            found = self._score_sets(fitted, columns, total, levels, noise, seed, stage)
            best = min(found, key=lambda name: (-comparable(found[name][0]), cost(name)))
            gain = comparable(found[best][0] - steps[-1].score)
            if gain < tolerance or gain <= 0:
                break
            steps.append(Step(best, *found[best], len(fitted[best][0])))
        return steps

    def _columns(self, blocks: Sequence[Block]) -> tuple[dict[Block, Tensor], int]:
        columns, total = {}, 0
        for block in blocks:
            dim = self.reader.dim(block[1])
            columns[block] = torch.arange(total, total + dim)
            total += dim
        return columns, total

    def _score_sets(
        self,
        fitted: Mapping[str, tuple[Tensor, LinearPath]],
        columns: Mapping[Block, Tensor],
        total: int,
        levels: Sequence[NoiseLevel],
        noise: str,
        seed: int,
        stage: str,
    ) -> dict[str, tuple[float, float]]:
        data = self.task.validation
        self.reader.progress.expect(stage, self.reader.forwards(data, len(levels)))
        scorers = {name: Scorer(self.task.metric, len(self.penalties), self.task.columns) for name in fitted}
        for targets, matrix in self._joined(data, columns, total, levels, noise, seed, side=False):
            for name, (chosen, path) in fitted.items():
                scorers[name].add(path.predict(matrix[:, chosen.to(matrix.device)]), targets)
        return {name: self._best(scorer, name, levels[0]) for name, scorer in scorers.items()}

    def _joined(
        self,
        data: Labelled,
        columns: Mapping[Block, Tensor],
        total: int,
        levels: Sequence[NoiseLevel],
        noise: str,
        seed: int,
        side: bool,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`(targets, features side by side (n, total))` for each batch of images."""
        paths = list(dict.fromkeys(path for _, path in columns))
        targets = self.task.side(data) if side else data.targets
        seed = validation_seed(noise, seed) if data is self.task.validation else seed
        for rows, stream in self.reader.read(data, levels, noise, seed, paths):
            matrix = torch.empty(rows.stop - rows.start, total, device=self.device)
            for level, part, features in stream:
                for path, feature in features.items():
                    if (level, path) in columns:
                        at = columns[level, path]
                        matrix[part, int(at[0]) : int(at[-1]) + 1] = feature.to(self.device)
            yield targets[rows], matrix


def _not_finite(what: str, level: NoiseLevel, data: Labelled) -> FloatingPointError:
    return FloatingPointError(
        f"{what!r} gave NaN or infinite features at timestep {level.timestep:g} on {data}. Load the model in float32 "
        "or bfloat16, or leave this layer out."
    )


__all__ = ["Search", "Step"]
