"""The stages of a selection: all cells, then the best few with other noise, then sets of layers and of levels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.features.noise_policy import validation_seed
from diffusers_repr.metrics.encoding import SharedRead
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.linear import LinearSums, comparable
from diffusers_repr.sweep.measure import CellScore, Measure
from diffusers_repr.sweep.run import Sweep
from diffusers_repr.sweep.search import Addition, grow
from diffusers_repr.sweep.selection import FeatureSet, SelectionCell


def place_of(cell: SelectionCell) -> tuple[str, float, str]:
    """What tells a cell from others: layer, timestep, policy."""
    return cell.layer, cell.timestep, cell.noise


@dataclass
class Stages:
    """All cells, then the best few with other noise, then sets."""

    grid: SweepGrid
    sweep: Sweep
    measure: Measure
    policies: Sequence[str]
    seeds: Sequence[int]
    keys: dict[str, Sequence[bytes]] = field(default_factory=dict)  # of the pixels of each split

    def most_forwards(self, finalists: int, max_layers: int, max_levels: int, candidates: int) -> dict[str, int]:
        """What the names of the stages begin with -> the most forwards of this process."""
        forwards, levels, noisy = self.sweep.forwards_of, len(self.grid.levels), set(self.policies) - {"clean"}
        both = ["train", "held"]
        again = (len(self.seeds) - 1) * min(finalists, levels * len(noisy)) * forwards(both, 1)
        near = min(candidates, levels)

        def grown(most: int, levels: int) -> int:
            return 0 if most < 2 else forwards(["train"], levels) + (most - 1) * forwards(["held"], levels)

        return {
            "all cells": len(self.policies) * forwards(both, self.sweep.levels_of(self.grid)),
            "finalists": again,
            "sets of layers": grown(max_layers, 1),
            "sets of levels": grown(max_levels, near),
        }

    def run(self, grid: SweepGrid, noise: str, seed: int, stage: str) -> dict[tuple[int, str], CellScore]:
        """Scores of the cells of a grid under one policy and seed."""
        found = self.sweep.run(grid, noise, split_seeds(noise, seed), stage, self.record_read)
        for (_, path), named in found.items():
            if named[self.measure.name].value is None:
                raise ValueError(f"{self.measure.name} of {path!r} is undefined: {named[self.measure.name].why}")
        return {key: named[self.measure.name] for key, named in found.items()}

    def record_read(self, role: str, read: SharedRead) -> None:
        """Tell, once both splits have been read, of images that are in both."""
        splits = self.sweep.bench.splits
        if role not in self.keys:
            self.keys[role] = read.keys
            if len(self.keys) == len(splits) and not self.measure.paired:
                tell_overlap(self.keys["train"], self.keys["held"], splits["train"].name, splits["held"].name)

    def score_all(self) -> list[SelectionCell]:
        """All cells, with the first seed."""
        cells = []
        for policy in self.policies:
            scores = self.run(self.grid, policy, self.seeds[0], f"all cells, {policy}")
            for at, place in self.grid.places():
                score, dim = scores[at, place["layer"]], self.measure.dim(self.grid.layers[place["layer"]])
                assert score.value is not None
                cells.append(SelectionCell(**place, dim=dim, noise=policy, score=score.value, penalty=score.penalty))
        return cells

    def preference(self, cell: SelectionCell) -> tuple[float, int, float, int, int]:
        """Of equal scores the smallest wins."""
        return cell.flops_share, cell.dim, cell.nsr, self.policies.index(cell.noise), cell.order

    def spread(self, cells: Sequence[SelectionCell], count: int) -> list[SelectionCell]:
        """The best cells with the score of every seed, best first."""
        top = _distinct(sorted(cells, key=lambda c: (-comparable(c.score), *self.preference(c))))[:count]
        found = {place_of(c): [c.score] for c in top}
        for policy in self.policies:
            mine = [c for c in top if c.noise == policy]
            used = sorted({self.grid.level_of(c.timestep) for c in mine})
            part = self.grid.part([c.layer for c in mine], used)
            for seed in self.seeds[1:] if mine else ():
                if policy == "clean":  # no noise: every seed gives the same
                    for cell in mine:
                        found[place_of(cell)].append(cell.score)
                    continue
                scores = self.run(part, policy, seed, f"finalists, noise seed {seed}")
                for cell in mine:
                    value = scores[part.level_of(cell.timestep), cell.layer].value
                    assert value is not None
                    found[place_of(cell)].append(value)
        ranked = []
        for cell in top:
            scored = found[place_of(cell)]
            spread = statistics.stdev(scored) if len(scored) > 1 else 0.0
            ranked.append(replace(cell, mean=statistics.fmean(scored), std=spread, seed_scores=tuple(scored)))
        return sorted(ranked, key=lambda c: (-comparable(c.mean or 0.0), *self.preference(c)))

    def sets(
        self,
        cells: Sequence[SelectionCell],
        best: SelectionCell,
        max_layers: int,
        max_levels: int,
        count: int,
        tolerance: float,
    ) -> dict[str, FeatureSet]:
        """The greedy set of layers at the best level, and of levels for these layers."""
        if not isinstance(self.measure, LinearSums):
            return {}
        start = Addition(best.layer, best.score, best.penalty, best.dim)
        seeds = split_seeds(best.noise, self.seeds[0])
        add = partial(grow, self.sweep, noise=best.noise, seeds=seeds, tolerance=tolerance)

        def fits(dim: int, measure: LinearSums = self.measure) -> bool:
            return measure.bytes_of_sums(dim, self.sweep.bench) <= self.sweep.memory

        rivals = [c for c in cells if (c.timestep, c.noise) == (best.timestep, best.noise)]
        near = _candidates(rivals, best, count, fits) if max_layers > 1 else []
        cost: dict[str, Any] = {c.layer: (c.flops_share, c.dim, c.order) for c in rivals}
        part = self.grid.part([c.layer for c in near], [self.grid.level_of(best.timestep)])
        units = {c.layer: [(0, c.layer)] for c in near}
        steps = add(part, units, start, max_layers, cost.__getitem__, "sets of layers")
        added = {step.added for step in steps}
        chosen = tuple(path for path in self.grid.layers if path in added)
        sets = {"layers": _feature_set(chosen, (best.timestep,), best.noise, steps, list(units) or [best.layer])}

        width = steps[-1].dim
        rivals = sorted((c for c in cells if (c.layer, c.noise) == (best.layer, best.noise)), key=lambda c: c.nsr)
        near = _candidates(rivals, best, count, fits, width) if max_levels > 1 else []
        near.sort(key=lambda c: c.nsr)
        cost = {str(c.timestep): c.nsr for c in rivals}
        part = self.grid.part(chosen, [self.grid.level_of(c.timestep) for c in near])
        start = Addition(str(best.timestep), steps[-1].score, steps[-1].penalty, width)
        units = {str(c.timestep): [(at, path) for path in chosen] for at, c in enumerate(near)}
        more = add(part, units, start, max_levels, cost.__getitem__, "sets of levels")
        added = {step.added for step in more}
        timesteps = tuple(c.timestep for c in rivals if str(c.timestep) in added)
        sets["levels"] = _feature_set(chosen, timesteps, best.noise, more, list(units) or [start.added])
        return sets


def split_seeds(noise: str, seed: int) -> dict[str, int]:
    """The seed of the noise of each split."""
    return {"train": seed, "held": validation_seed(noise, seed)}


def _candidates(
    rivals: Sequence[SelectionCell],
    best: SelectionCell,
    count: int,
    fits: Callable[[int], bool],
    dim: int | None = None,
) -> list[SelectionCell]:
    """The best `count` of the rivals, the best cell first; no more than their joint sums leave memory for."""

    def rank(cell: SelectionCell) -> tuple[Any, ...]:
        others = (cell.layer, cell.timestep) != (best.layer, best.timestep)
        return others, -comparable(cell.score), cell.flops_share, cell.dim, cell.nsr

    taken: list[SelectionCell] = []
    total = 0
    for cell in _distinct(sorted(rivals, key=rank))[:count]:
        total += cell.dim if dim is None else dim
        if taken and not fits(total):
            break
        taken.append(cell)
    return taken


def _distinct(cells: Sequence[SelectionCell]) -> list[SelectionCell]:
    """Without repeats: a stage and its last block return the same tensor, for the same FLOPs."""
    found: dict[tuple[Any, ...], SelectionCell] = {}
    for cell in cells:
        found.setdefault((cell.timestep, cell.noise, cell.flops_share, cell.dim, cell.score, cell.penalty), cell)
    return list(found.values())


def _feature_set(
    layers: tuple[str, ...],
    timesteps: tuple[float, ...],
    noise: str,
    steps: Sequence[Addition],
    candidates: Sequence[str],
) -> FeatureSet:
    last = steps[-1]
    trace = tuple((step.added, step.score) for step in steps)
    return FeatureSet(layers, timesteps, noise, last.score, last.penalty, last.dim, trace, tuple(candidates))


__all__ = ["Stages", "place_of", "split_seeds"]
