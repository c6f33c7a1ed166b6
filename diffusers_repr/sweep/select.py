"""`select_features`: which noise level and which layers carry what a task needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusers_repr.capture import check_layers
from diffusers_repr.data.labelled import Labelled, Source
from diffusers_repr.denoiser import Denoiser, Layer, list_layers
from diffusers_repr.denoiser.denoiser import require_denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.extractor import Timestep
from diffusers_repr.features.noise_policy import check_policy
from diffusers_repr.features.pooling import check_pooling, pooled_size
from diffusers_repr.heads.fitting.sums import CRITERIA, PENALTIES, check_penalties
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.selection_data import Task, hold_out, make_task
from diffusers_repr.sweep.selection_read import Progress, Reader
from diffusers_repr.sweep.selection_result import Cell, FeatureSet, Selection
from diffusers_repr.sweep.selection_score import comparable
from diffusers_repr.sweep.selection_search import Search, Step


def select_features(
    denoiser: Denoiser,
    train: Source,
    validation: Source,
    timesteps: Sequence[Timestep],
    layers: Sequence[str] | None = None,
    metric: str = "accuracy",
    pooling: str = "mean",
    noise: str | Sequence[str] = "per_image",
    batch_size: int = 64,
    *,
    criterion: str = "ridge",
    penalties: Sequence[float] = PENALTIES,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    finalists: int = 5,
    max_layers: int = 3,
    max_levels: int = 2,
    candidates: int = 8,
    tolerance: float = 0.005,
    memory_gib: float = 4.0,
    progress: bool = True,
) -> Selection:
    """Find the noise level and layers whose features suit a task.

    The survey (arXiv 2407.00783) states the choice, for extraction from a frozen model, as

        (t*, B*) = argmin over t, B of L_disc(t, B),

    L_disc being the loss of a head trained on the features of layers B at level t. Here L_disc is one minus the
    `metric`, on `validation`, of a linear head fitted in closed form on `train`, the best over a grid of penalties.
    All cells (one level, one layer) are tried; sets B, and sets of levels, are grown greedily from the best cell.

    Each image passes the network once a level, for all layers; features are pooled at once and enter float64 sums
    (count, mean, Gram matrix, cross sums with the labels), so memory does not grow with the data. The best cells are
    fitted and scored again with every noise seed; the best is the one with the highest mean. Equal scores go to the
    cheaper layer (`flops_share`), then the smaller feature, then the less noisy level, then the policy named first. No
    test data is read: measure the final probe on a test split of your own.

    Args:
        denoiser: Any `Denoiser`.
        train: Images and labels to fit on: `ImageData`, a `datasets.Dataset`, or `(images, labels)`; numbers as
            targets, `(n,)` or `(n, K)`, in the last form only.
        validation: The same, to score on; other images.
        timesteps: Levels to try: training timesteps or `NoiseLevel`s.
        layers: Full module paths; all of `list_layers(denoiser)` if None.
        metric: `accuracy`, `balanced_accuracy` (mean over classes), `neg_brier` (minus the Brier score of the ridge's
            outputs: finer where accuracy is near 1 for many cells); for numbers as targets `r2`, `neg_mse`.
        pooling: `mean`, `max` or `adaptive:P`.
        noise: Policy, see `FeatureExtractor`; a list makes it a third axis, e.g. `("per_image", "clean")`.
        batch_size: Images a forward.
        criterion: The head: `ridge` (regression onto one-hot labels) or `lda` (multinomial logistic model with the
            coefficients of Gaussian classes); both come from the same sums.
        penalties: Grid of regularisers, for standardised features and a loss that is a mean over images.
        prompt: One for all images.
        class_labels: One id for all images, for class-conditional models; never the labels of the task.
        image_size: Resize images to (H, W) or a square.
        seeds: Of the noise; the table has the first, the finalists have all.
        finalists: Number of cells that are scored with every seed.
        max_layers: Largest set of layers; 1 skips the search.
        max_levels: Largest set of levels; 1 skips the search.
        candidates: Best layers, and best levels, from which sets are grown; fewer if joint sums pass `memory_gib`.
        tolerance: Least gain of the metric for which a set grows.
        memory_gib: Limit on the sums; levels take turns, with more passes over the images, if all do not fit.
        progress: Show a bar of forwards.

    Returns:
        A `Selection`: `.best`, `.cells`, `.finalists`, `.sets`, `.save(folder)`, `.extractor(denoiser)`.

    Raises:
        ValueError, TypeError: For unknown layers, levels, policies or metrics, test splits, unusable labels, a
            validation split of one class, or sums that pass `memory_gib`, before the first forward; after the first
            pass, for images of `validation` that are all in `train` (a warning tells of some that are).
        FloatingPointError: If a layer gives NaN or infinite features; names it.
    """
    require_denoiser(denoiser)
    policies = [noise] if isinstance(noise, str) else list(noise)
    _check(policies, pooling, criterion, metric, seeds, prompt, class_labels)
    for name, value in {
        "batch_size": batch_size,
        "finalists": finalists,
        "max_layers": max_layers,
        "max_levels": max_levels,
        "candidates": candidates,
    }.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
    levels = _levels(denoiser, timesteps)
    task = make_task(train, validation, metric)
    table = _layers(denoiser, layers, task.train, image_size)
    bar = Progress(progress)
    condition = {"prompt": prompt, "class_labels": class_labels}
    reader = Reader(denoiser, table, pooling, batch_size, condition, image_size, bar)
    grid = check_penalties(penalties)
    search = Search(task, reader, criterion, grid, int(memory_gib * 2**30), _device(denoiser))
    try:
        with torch.no_grad(), denoiser.evaluating():
            cells = _score_all(search, levels, policies, seeds[0])
            ranked = _spread(search, levels, cells, policies, seeds, finalists)
            sets = _sets(search, levels, cells, ranked[0], seeds[0], max_layers, max_levels, candidates, tolerance)
    finally:
        bar.close()
    final = {(c.layer, c.timestep, c.noise): c for c in ranked}
    cells = [final.get((c.layer, c.timestep, c.noise), c) for c in cells]
    recipe = {
        "model": denoiser.name,
        "revision": denoiser.revision,
        "model_class": type(denoiser.model).__name__,
        "train": {"name": str(task.train), "rows": len(task.train)},
        "validation": {"name": str(task.validation), "rows": len(task.validation)},
        "classes": None if task.classes is None else list(task.classes),
        "pooling": pooling,
        "criterion": criterion,
        "penalties": list(grid),
        "prompt": prompt,
        "class_labels": class_labels,
        "image_size": list(image_size) if isinstance(image_size, tuple) else image_size,
        "batch_size": batch_size,
        "tolerance": tolerance,
        "forwards": bar.forwards,
    }
    return Selection(tuple(cells), ranked[0], tuple(ranked), sets, metric, tuple(seeds), recipe)


# Checks


def _check(
    policies: Sequence[str],
    pooling: str,
    criterion: str,
    metric: str,
    seeds: Sequence[int],
    prompt: Any,
    class_labels: Any,
) -> None:
    for policy in policies:
        check_policy(policy)
    if not policies or len(set(policies)) < len(policies):
        raise ValueError(f"noise must name each policy once; got {list(policies)}.")
    if check_pooling(pooling) is None:
        raise ValueError("pooling=None leaves maps; selection compares vectors: 'mean', 'max' or 'adaptive:P'.")
    if criterion not in CRITERIA:
        raise ValueError(f"Unknown criterion {criterion!r}; expected one of {', '.join(CRITERIA)}.")
    if metric == "neg_brier" and criterion != "ridge":
        raise ValueError(f"metric='neg_brier' measures the ridge's own loss; got criterion={criterion!r}.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be at least one whole number, each once; got {list(seeds)}.")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt must be one string for all images; got {type(prompt).__name__}.")
    if class_labels is not None and (isinstance(class_labels, bool) or not isinstance(class_labels, int)):
        raise TypeError(
            "class_labels conditions the model and must be one id for all images; the labels of the task belong to "
            f"`train` and `validation`. Got {type(class_labels).__name__}."
        )


def _levels(denoiser: Denoiser, timesteps: Sequence[Timestep]) -> list[NoiseLevel]:
    if isinstance(timesteps, (int, float, str, NoiseLevel)) or not isinstance(timesteps, Sequence):
        raise TypeError(f"timesteps must be a list of levels, e.g. [10, 50, 100]; got {timesteps!r}.")
    if not timesteps:
        raise ValueError("No timesteps: the list is empty.")
    levels = [denoiser.level(t) for t in timesteps]
    seen: set[float] = set()
    for level in levels:
        if level.timestep in seen:
            raise ValueError(f"Timestep {level.timestep:g} is given twice.")
        seen.add(level.timestep)
    return levels


def _layers(
    denoiser: Denoiser, layers: Sequence[str] | None, data: Labelled, image_size: int | tuple[int, int] | None
) -> dict[str, Layer]:
    """Path -> layer, in execution order."""
    if layers is not None:
        check_layers(denoiser.model, layers)
        layers = [layers] if isinstance(layers, str) else list(layers)
    _, first = next(data.batches(1))
    pixels = to_pixels(first, denoiser.image_channels, image_size)
    size = (pixels.shape[2], pixels.shape[3])
    table = {layer.path: layer for layer in list_layers(denoiser, size, "blocks")}
    if layers is None:
        return table
    if not all(path in table for path in layers):
        table = {layer.path: layer for layer in list_layers(denoiser, size, "all")}
    for path in layers:
        if path not in table:
            raise ValueError(
                f"Layer {path!r} returns no image, or runs more than once a forward; `list_layers(denoiser)` shows "
                "what can be selected from."
            )
    return {path: layer for path, layer in table.items() if path in layers}


def _device(denoiser: Denoiser) -> torch.device:
    """Where sums are kept: the model's device if it knows float64."""
    return denoiser.device if denoiser.device.type in ("cpu", "cuda") else torch.device("cpu")


# Stages


def _score_all(search: Search, levels: Sequence[NoiseLevel], policies: Sequence[str], seed: int) -> list[Cell]:
    table = search.reader.layers
    cells = []
    for policy in policies:
        scores = search.score_cells(levels, policy, seed, list(table), f"all cells, {policy}")
        for at, level in enumerate(levels):
            for order, (path, layer) in enumerate(table.items()):
                score, penalty = scores[at, path]
                dim = layer.channels * pooled_size(search.reader.pooling)
                timestep = int(level.timestep) if float(level.timestep).is_integer() else float(level.timestep)
                cell = Cell(path, order, timestep, policy, float(level.nsr), score, penalty, layer.flops_share, dim)
                cells.append(cell)
    return cells


def _preference(cell: Cell, policies: Sequence[str]) -> tuple[float, int, float, int, int]:
    """Of equal scores the smallest wins."""
    return cell.flops_share, cell.dim, cell.nsr, policies.index(cell.noise), cell.order


def _spread(
    search: Search,
    levels: Sequence[NoiseLevel],
    cells: Sequence[Cell],
    policies: Sequence[str],
    seeds: Sequence[int],
    count: int,
) -> list[Cell]:
    """The best cells with the score of every seed, best first."""
    top = _distinct(sorted(cells, key=lambda c: (-comparable(c.score), *_preference(c, policies))))[:count]
    found = {(c.noise, c.timestep, c.layer): [c.score] for c in top}
    for policy in policies:
        mine = [c for c in top if c.noise == policy]
        used = [level for level in levels if any(c.timestep == level.timestep for c in mine)]
        paths = [path for path in search.reader.layers if any(c.layer == path for c in mine)]
        for seed in seeds[1:] if mine else ():
            if policy == "clean":  # no noise: every seed gives the same
                for cell in mine:
                    found[policy, cell.timestep, cell.layer].append(cell.score)
                continue
            scores = search.score_cells(used, policy, seed, paths, f"finalists, noise seed {seed}")
            for cell in mine:
                at = next(i for i, level in enumerate(used) if level.timestep == cell.timestep)
                found[policy, cell.timestep, cell.layer].append(scores[at, cell.layer][0])
    ranked = []
    for cell in top:
        scored = found[cell.noise, cell.timestep, cell.layer]
        spread = statistics.stdev(scored) if len(scored) > 1 else 0.0
        ranked.append(replace(cell, mean=statistics.fmean(scored), std=spread, seed_scores=tuple(scored)))
    return sorted(ranked, key=lambda c: (-comparable(c.mean or 0.0), *_preference(c, policies)))


def _sets(
    search: Search,
    levels: Sequence[NoiseLevel],
    cells: Sequence[Cell],
    best: Cell,
    seed: int,
    max_layers: int,
    max_levels: int,
    count: int,
    tolerance: float,
) -> dict[str, FeatureSet]:
    at = next(i for i, level in enumerate(levels) if level.timestep == best.timestep)
    start = Step(best.layer, best.score, best.penalty, best.dim)
    rivals = [c for c in cells if (c.timestep, c.noise) == (best.timestep, best.noise)]
    units = {c.layer: [(0, c.layer)] for c in _candidates(search, rivals, best, count)} if max_layers > 1 else {}
    by_layer = {c.layer: (c.flops_share, c.dim, c.order) for c in rivals}
    steps = search.grow(
        units, start, [levels[at]], best.noise, seed, max_layers, tolerance, by_layer.__getitem__, "sets of layers"
    )
    chosen = tuple(path for path in search.reader.layers if path in {step.added for step in steps})
    sets = {"layers": _feature_set(chosen, (best.timestep,), best.noise, steps, list(units) or [best.layer])}

    width = steps[-1].dim
    rivals = [c for c in cells if (c.layer, c.noise) == (best.layer, best.noise)]
    near = _candidates(search, rivals, best, count, width) if max_levels > 1 else []
    used = sorted(near, key=lambda c: c.nsr)
    names = {c.timestep: str(c.timestep) for c in rivals}
    units = {names[c.timestep]: [(i, path) for path in chosen] for i, c in enumerate(used)}
    by_level = {names[c.timestep]: c.nsr for c in rivals}
    first = Step(names[best.timestep], steps[-1].score, steps[-1].penalty, width)
    resolved = [next(level for level in levels if level.timestep == c.timestep) for c in used]
    more = search.grow(
        units, first, resolved, best.noise, seed, max_levels, tolerance, by_level.__getitem__, "sets of levels"
    )
    added = {step.added for step in more}
    timesteps = tuple(c.timestep for c in sorted(rivals, key=lambda c: c.nsr) if names[c.timestep] in added)
    sets["levels"] = _feature_set(chosen, timesteps, best.noise, more, list(units) or [first.added])
    return sets


def _candidates(search: Search, rivals: Sequence[Cell], best: Cell, count: int, dim: int | None = None) -> list[Cell]:
    """The best `count` of the rivals, the best cell first; no more than their joint sums leave memory for."""

    def rank(cell: Cell) -> tuple[Any, ...]:
        others = (cell.layer, cell.timestep) != (best.layer, best.timestep)
        return others, -comparable(cell.score), cell.flops_share, cell.dim, cell.nsr

    taken: list[Cell] = []
    total = 0
    for cell in _distinct(sorted(rivals, key=rank))[:count]:
        total += cell.dim if dim is None else dim
        if taken and search.bytes_of(total) > search.memory:
            break
        taken.append(cell)
    return taken


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Without repeats: a stage and its last block return the same tensor, for the same FLOPs."""
    found: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        found.setdefault((cell.timestep, cell.noise, cell.flops_share, cell.dim, cell.score, cell.penalty), cell)
    return list(found.values())


def _feature_set(
    layers: tuple[str, ...], timesteps: tuple[float, ...], noise: str, steps: Sequence[Step], candidates: Sequence[str]
) -> FeatureSet:
    last = steps[-1]
    trace = tuple((step.added, step.score) for step in steps)
    return FeatureSet(layers, timesteps, noise, last.score, last.penalty, last.dim, trace, tuple(candidates))


__all__ = ["Selection", "Task", "hold_out", "select_features"]
