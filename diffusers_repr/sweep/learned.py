"""The learnable selector: mixing weights over layers and levels, fitted together with a linear head, then pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.closed_form import standardise
from diffusers_repr.metrics.gather import sum_over_processes
from diffusers_repr.sweep.grid import SweepGrid, plain_timestep
from diffusers_repr.sweep.linear import LinearSums, comparable, fit_targets
from diffusers_repr.sweep.measure import Key, Measure, not_finite
from diffusers_repr.sweep.run import Sweep
from diffusers_repr.sweep.search import JointTally
from diffusers_repr.sweep.selection import FeatureSet, SelectionCell

METHODS = ("greedy", "learned")
LEARNED = "learned selector"  # the stage, for the progress bar
MAX_COLUMNS = 2048  # of all candidates side by side: each round of the fit solves for so many unknowns
PENALTIES = (1e-2, 1e-3, 1e-4)  # on the head; the larger, the fewer cells keep a weight; of equal sets the first
_ROUNDS = 60
_STILL = 1e-6  # change of the weights at which the fit has come to rest


class Learned(NamedTuple):
    """What the selector came to.

    Attributes:
        layers: Those kept, in the order of the network.
        levels: Indices of the levels kept.
        score: On `held`, of the head fitted anew on what is kept.
        penalty: Of that head.
        dim: Length of its features.
        selector_penalty: Of the selector that led to it.
        shares: Mixing weights of all candidates, `(levels, layers)`, 1 in all.
    """

    layers: tuple[str, ...]
    levels: tuple[int, ...]
    score: float
    penalty: float
    dim: int
    selector_penalty: float
    shares: Tensor


def check_method(method: str, measure: Measure) -> None:
    """Refuse a method that there is not, or that a measure does not serve.

    Raises:
        ValueError: If so.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}.")
    if method == "learned" and not isinstance(measure, LinearSums):
        raise ValueError(
            f"method='learned' fits a linear head, which {measure.name!r} does not; take method='greedy'."
        )


def mixing_shares(correlation: Tensor, cross: Tensor, groups: Sequence[Tensor], penalty: float) -> Tensor:
    """Mixing weights w of groups of features, fitted together with a linear head on their weighted sum.

    Minimises `mean |y - sum_c sqrt(w_c) P_c z_c|^2 + penalty sum_c |P_c|^2` over heads P and weights w >= 0 that sum
    to 1: kernel ridge regression whose kernel is the mixture `sum_c w_c z_c z_c'` (multiple kernel learning). z are
    standardised features, each group scaled to variance 1 in all. The two are solved in turn, each exactly: P is a
    ridge regression on the weighted features; for given `B_c = sqrt(w_c) P_c` the best w is `|B_c|`, normalised. So
    the objective never rises; with w eliminated it is convex in B, the penalty being `(sum_c |B_c|)^2`, by which
    groups that say nothing new lose their weight.

    Args:
        correlation: Of the features, `(D, D)` float64.
        cross: Covariance of standardised features and targets, `(D, K)`.
        groups: Columns of each group.
        penalty: Above 0.

    Returns:
        `(groups,)` float64.
    """
    owner = torch.empty(len(correlation), dtype=torch.long, device=correlation.device)
    for at, columns in enumerate(groups):
        owner[columns] = at
    size = torch.bincount(owner, minlength=len(groups)).double()
    scale = size[owner].rsqrt()
    gram, right = scale[:, None] * correlation * scale, scale[:, None] * cross
    weights = torch.full((len(groups),), 1 / len(groups), dtype=torch.float64, device=correlation.device)
    for _ in range(_ROUNDS):
        spread = weights.sqrt()[owner]
        matrix = spread[:, None] * gram * spread
        matrix.diagonal().add_(penalty)
        head = torch.cholesky_solve(spread[:, None] * right, torch.linalg.cholesky(matrix))
        norms = torch.zeros_like(weights).index_add_(0, owner, (spread[:, None] * head).square().sum(1)).sqrt()
        if not bool(norms.any()):
            return weights
        fresh = norms / norms.sum()
        still = float((fresh - weights).abs().max()) < _STILL
        weights = fresh
        if still:
            break
    return weights


def learn(
    sweep: Sweep,
    grid: SweepGrid,
    most_layers: int,
    most_levels: int,
    *,
    noise: str,
    seeds: Mapping[str, int],
) -> Learned:
    """Fit selectors on `train`, prune each to its best layers and levels, and keep the one that scores best on `held`.

    Two passes over the images: one for the joint sums of all candidates, one to score the heads that are fitted anew.

    Args:
        sweep: Its one measure is a `LinearSums`.
        grid: The candidates: every layer at every level.
        most_layers: Layers that are kept at most.
        most_levels: Levels that are kept at most.
        noise: Policy.
        seeds: Of the noise, by split.
    """
    measure, bench = sweep.measures[0], sweep.bench
    assert isinstance(measure, LinearSums)
    cells: list[Key] = [(at, path) for at in range(len(grid.levels)) for path in grid.layers]
    columns: dict[Key, Tensor] = {}
    total = 0
    for cell in cells:
        columns[cell] = torch.arange(total, total := total + measure.dim(grid.layers[cell[1]]))
    train, held = bench.splits["train"], bench.splits["held"]
    moments = measure.moments(total, 1, bench)
    sweep.expect(LEARNED, ["train"], len(grid.levels))
    add = JointTally(
        columns, total, measure.pooling, bench.device, lambda at, x: moments.add(x, fit_targets(train, at))
    )
    sweep.read(grid, "train", [add], [measure.pooling], noise, seeds["train"])
    moments.reduce(sum_over_processes)
    standard = standardise(moments)
    groups = [columns[cell].to(bench.device) for cell in cells]
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[float, Tensor]] = {}
    for penalty in PENALTIES:
        shares = mixing_shares(standard.correlation[0], standard.cross[0], groups, penalty)
        shares = shares.view(len(grid.levels), len(grid.layers)).cpu()
        kept = prune(shares, list(grid.layers), most_layers, most_levels)
        found.setdefault(kept, (penalty, shares))

    chosen = {kept: torch.cat([columns[at, path] for at in kept[0] for path in kept[1]]) for kept in found}
    heads = {kept: (measure.fit(moments.take(index)), measure.scorer(bench)) for kept, index in chosen.items()}

    def score(at: Tensor, matrix: Tensor) -> None:
        for kept, (path, scorer) in heads.items():
            scorer.add(path.predict(matrix[:, chosen[kept].to(matrix.device)]), held.targets[at])

    sweep.expect(LEARNED, ["held"], len(grid.levels))
    tally = JointTally(columns, total, measure.pooling, bench.device, score)
    sweep.read(grid, "held", [tally], [measure.pooling], noise, seeds["held"])
    broken = not_finite("the learned set", grid.levels[0], held.name)
    scored = {kept: scorer.best(measure.penalties, broken) for kept, (_, scorer) in heads.items()}
    best = min(scored, key=lambda kept: (-comparable(scored[kept][0]), len(chosen[kept])))
    penalty, shares = found[best]
    return Learned(best[1], best[0], *scored[best], len(chosen[best]), penalty, shares)


def prune(
    shares: Tensor, layers: Sequence[str], most_layers: int, most_levels: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The levels and layers of the largest shares, in order; of those that have one at all.

    Args:
        shares: `(levels, layers)`.
        layers: Their paths.
        most_layers: Kept at most.
        most_levels: Kept at most.

    Returns:
        Indices of levels, and paths.

    Example:
        >>> prune(torch.tensor([[0.1, 0.5], [0.0, 0.4]]), ["a", "b"], 1, 2)
        ((0, 1), ('b',))
    """
    kept = []
    for along, most in ((1, most_levels), (0, most_layers)):
        sums = shares.sum(along)
        top = sums.argsort(descending=True, stable=True)[:most].tolist()
        kept.append(tuple(sorted(at for at in top if sums[at] > _STILL) or top[:1]))
    return kept[0], tuple(layers[at] for at in kept[1])


def learned_set(
    sweep: Sweep,
    grid: SweepGrid,
    cells: Sequence[SelectionCell],
    noise: str,
    most_layers: int,
    most_levels: int,
    seeds: Mapping[str, int],
) -> tuple[FeatureSet, dict[str, Any]]:
    """The set that the selector keeps, and its mixing weights, for the recipe.

    Candidates are the layers and levels whose best cells score best, as many as `MAX_COLUMNS` and memory allow.

    Args:
        sweep: As in `learn`.
        grid: All layers and levels.
        cells: All of them, scored.
        noise: Policy; cells of others are left out.
        most_layers: As in `learn`.
        most_levels: As in `learn`.
        seeds: As in `learn`.
    """
    measure = sweep.measures[0]
    assert isinstance(measure, LinearSums)
    own = [cell for cell in cells if cell.noise == noise]
    best: dict[Any, float] = {}
    for cell in own:
        for key in (cell.layer, grid.level_of(cell.timestep)):
            best[key] = max(best.get(key, -math.inf), cell.score)
    ranked = sorted(best, key=lambda key: -comparable(best[key]))
    limit = MAX_COLUMNS
    while limit > 1 and measure.bytes_of_sums(limit, sweep.bench) > sweep.memory:
        limit //= 2
    dims = {path: measure.dim(layer) for path, layer in grid.layers.items()}
    layers, levels = candidates_within(
        dims, [key for key in ranked if isinstance(key, str)], [key for key in ranked if isinstance(key, int)], limit
    )
    part = grid.part([path for path in grid.layers if path in layers], sorted(levels))
    found = learn(sweep, part, most_layers, most_levels, noise=noise, seeds=seeds)
    told = [plain_timestep(level) for level in part.levels]
    shares = found.shares
    weights = {
        "selector_penalty": found.selector_penalty,
        "layers": dict(zip(part.layers, shares.sum(0).tolist(), strict=True)),
        "timesteps": [[time, share] for time, share in zip(told, shares.sum(1).tolist(), strict=True)],
        "shares": shares.tolist(),
    }
    name = f"mixing weights at penalty {found.selector_penalty:g}"
    candidates = tuple(f"{path} at {time:g}" for time in told for path in part.layers)
    timesteps = tuple(float(part.levels[at].timestep) for at in found.levels)
    steps = ((name, found.score),)
    return FeatureSet(
        found.layers, timesteps, noise, found.score, found.penalty, found.dim, steps, candidates
    ), weights


def candidates_within(
    dims: Mapping[str, int], ranked_layers: Sequence[str], ranked_levels: Sequence[int], limit: int = MAX_COLUMNS
) -> tuple[list[str], list[int]]:
    """The best layers and levels of which all, side by side, have at most so many columns; one of each in any case.

    Args:
        dims: Layer -> length of its feature.
        ranked_layers: Best first.
        ranked_levels: Best first.
        limit: Columns.

    Example:
        >>> candidates_within({"a": 10, "b": 20}, ["a", "b"], [3, 1, 2], limit=60)
        (['a', 'b'], [3, 1])
    """
    layers, levels = list(ranked_layers), list(ranked_levels)
    while sum(dims[path] for path in layers) * len(levels) > limit and (len(layers) > 1 or len(levels) > 1):
        (layers if len(layers) > len(levels) or len(levels) == 1 else levels).pop()
    return layers, levels


__all__ = [
    "LEARNED",
    "METHODS",
    "Learned",
    "candidates_within",
    "check_method",
    "learn",
    "learned_set",
    "mixing_shares",
    "prune",
]
