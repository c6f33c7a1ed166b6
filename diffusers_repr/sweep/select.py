"""`select_features`: which noise level and which layers carry what a task needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.data.labelled import LabelledSource
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.features.noise_policy import check_policy
from diffusers_repr.features.pooling import check_pooling
from diffusers_repr.heads.fitting.closed_form import PENALTIES
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.gather import sum_over_processes
from diffusers_repr.noise import LevelLike
from diffusers_repr.sweep.grid import SweepGrid, resolve_layers, resolve_levels
from diffusers_repr.sweep.learned import LEARNED, check_method, learned_set
from diffusers_repr.sweep.linear import LinearSums
from diffusers_repr.sweep.measure import Bench, Measure, make_measure
from diffusers_repr.sweep.pck import open_pairs
from diffusers_repr.sweep.progress import Progress, SweepBar
from diffusers_repr.sweep.run import Sweep
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.sweep.splits import open_splits
from diffusers_repr.sweep.stages import Stages, place_of, split_seeds
from diffusers_repr.sweep.trained import trained_heads


def select_features(
    denoiser: Denoiser,
    train: LabelledSource | ImagePairs,
    validation: LabelledSource | None,
    timesteps: Sequence[LevelLike],
    layers: Sequence[str] | None = None,
    metric: str | Measure = "accuracy",
    pooling: str | None = "mean",
    noise: str | Sequence[str] = "per_image",
    batch_size: int = 64,
    *,
    criterion: str = "ridge",
    penalties: Sequence[float] = PENALTIES,
    draws: int = 1,
    crop: int = 0,
    flip: bool = False,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: ImageSize = None,
    seeds: Sequence[int] = (0, 1, 2),
    finalists: int = 5,
    max_layers: int | None = None,
    max_levels: int | None = None,
    candidates: int = 8,
    tolerance: float = 0.005,
    memory_gib: float = 4.0,
    method: str = "greedy",
    progress: Progress = True,
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
    test data is read: measure the final probe on a test split of your own. Under `accelerate launch` the processes
    share the images.

    Args:
        denoiser: Any `Denoiser`.
        train: Images and labels to fit on: `ImageData`, a `datasets.Dataset`, or `(images, labels)`; numbers as
            targets, `(n,)` or `(n, K)`, in the last form only.
        validation: The same, to score on; other images. With `metric="pck"`, which fits nothing, None: then `train` is
            `ImagePairs`, or a list of `(source, target, source_points, target_points)`.
        timesteps: Levels to try: training timesteps or `NoiseLevel`s.
        layers: Full module paths; all of `list_layers(denoiser)` if None.
        metric: `accuracy`, `balanced_accuracy` (mean over classes), `neg_brier` (minus the Brier score of the ridge's
            outputs: finer where accuracy is near 1 for many cells); for numbers as targets `r2`, `neg_mse`; of pairs
            of images with points `pck`, or a `PCKMeasure` of yours. Any other registered `Measure` that needs no
            encoder, or one of your own: cells are scored by it, sets are not grown.
        pooling: `mean`, `max` or `adaptive:P`; dense measures have none.
        noise: Policy, see `FeatureExtractor`; a list makes it a third axis, e.g. `("per_image", "clean")`.
        batch_size: Images a forward.
        criterion: The head: `ridge` (regression onto one-hot labels) or `lda` (multinomial logistic model with the
            coefficients of Gaussian classes); both come from the same sums. Or a protocol of gradient steps, `ddae`
            (the linear probe of DDAE, arXiv 2303.09769) or another by `adam` or `sgd`: then features are kept, a head
            for every cell is trained on them, all together, and sets are not grown; see `TrainedHeads`.
        penalties: Grid of regularisers, for standardised features and a loss that is a mean over images.
        draws: With such a protocol: how often `train` is read, each time with other noise; epochs take turns.
        crop: With such a protocol: each reading moves every image of `train` by up to so many pixels.
        flip: With such a protocol: each reading mirrors half the images of `train`.
        prompt: One for all images.
        class_labels: One id for all images, for class-conditional models; never the labels of the task.
        image_size: As in `FeatureExtractor`: the model's own size if None; `"keep"` for the images'.
        seeds: Of the noise; the table has the first, the finalists have all.
        finalists: Number of cells that are scored with every seed.
        max_layers: Largest set of layers; 1 skips the search. 3 if None, where sets are grown.
        max_levels: Largest set of levels; 1 skips the search. 2 if None, where sets are grown.
        candidates: Best layers, and best levels, from which sets are grown; fewer if joint sums pass `memory_gib`.
        tolerance: Least gain of the metric for which a set grows.
        memory_gib: Limit on the sums; levels, then layers, take turns, with more passes over the images, if all do not
            fit.
        method: `greedy`, or `learned`: beside the grown sets one that the survey's learnable selector finds, mixing
            weights over layers and levels that are fitted with a linear head, see `mixing_shares`, and pruned to
            `max_layers` and `max_levels`. It is `.sets["learned"]`; the weights are `.recipe["learned"]`.
        progress: Show a bar of forwards; or a function that is called with the share that is done, in [0, 1].

    Returns:
        A `Selection`: `.best`, `.cells`, `.finalists`, `.sets`, `.save(folder)`, `.extractor(denoiser)`.

    Raises:
        ValueError, TypeError: For unknown layers, levels, policies or metrics, test splits, unusable labels, a
            validation split of one class, or sums of one layer that pass `memory_gib`, before the first forward; after
            the first pass, for images of `validation` that are all in `train` (a warning tells of some that are).
        FloatingPointError: If a layer gives NaN or infinite features; names it.
    """
    require_images(denoiser, "Selection")
    policies = [noise] if isinstance(noise, str) else list(noise)
    measure = choose_measure(metric, pooling, criterion, penalties, draws, crop, flip)
    grown = isinstance(measure, LinearSums)
    max_layers, max_levels = (
        usual if asked is None else asked
        for asked, usual in ((max_layers, 3 if grown else 1), (max_levels, 2 if grown else 1))
    )
    _check(policies, measure, seeds, prompt, class_labels, max_layers, max_levels)
    for name, value in {
        "batch_size": batch_size,
        "finalists": finalists,
        "max_layers": max_layers,
        "max_levels": max_levels,
        "candidates": candidates,
    }.items():
        check_whole(name, value, 1)
    check_method(method, measure)
    levels = resolve_levels(denoiser, timesteps)
    splits, classes = (
        (open_pairs(train, validation), None) if measure.paired else open_splits(train, validation, measure)
    )
    resize = denoiser.resize_to(image_size)
    table = resolve_layers(denoiser, layers, splits["train"].image_size(denoiser.image_channels, resize))
    grid = SweepGrid(denoiser, table, tuple(levels))
    bench = Bench(splits, grid.device)
    measure.check(bench)
    with SweepBar(progress, "selection") as bar:
        condition = {"prompt": prompt, "class_labels": class_labels}
        sweep = Sweep([measure], bench, int(memory_gib * 2**30), batch_size, condition, resize, bar)
        stages = Stages(grid, sweep, measure, policies, seeds)
        planned = stages.most_forwards(finalists, max_layers, max_levels, candidates)
        if method == "learned":
            planned[LEARNED] = sweep.forwards_of(["train", "held"], len(levels))
        bar.plan(planned)
        cells = stages.score_all()
        ranked = stages.spread(cells, finalists)
        sets = stages.sets(cells, ranked[0], max_layers, max_levels, candidates, tolerance)
        learned: dict[str, Any] = {}
        if method == "learned":
            noise_seeds = split_seeds(ranked[0].noise, seeds[0])
            sets["learned"], learned["learned"] = learned_set(
                sweep, grid, cells, ranked[0].noise, max_layers, max_levels, noise_seeds
            )
        forwards = int(sum_over_processes(torch.tensor(sweep.forwards)))
    final = {place_of(cell): cell for cell in ranked}
    cells = [final.get(place_of(cell), cell) for cell in cells]
    recipe = {
        "model": denoiser.name,
        "revision": denoiser.revision,
        "model_class": type(denoiser.model).__name__,
        "train": {"name": splits["train"].name, "rows": len(splits["train"])},
        "validation": {"name": splits["held"].name, "rows": len(splits["held"])},
        "classes": classes,
        "pooling": measure.pooling,
        "criterion": criterion,
        "penalties": sorted(float(penalty) for penalty in penalties),
        "prompt": prompt,
        "class_labels": class_labels,
        "image_size": None if resize is None else list(resize),
        "batch_size": batch_size,
        "tolerance": tolerance,
        "forwards": forwards,
        **learned,
        **({} if grown else {"measure": measure.describe()}),
    }
    return Selection(tuple(cells), ranked[0], tuple(ranked), sets, measure.name, tuple(seeds), recipe)


def choose_measure(
    metric: str | Measure,
    pooling: str | None,
    criterion: str,
    penalties: Sequence[float] = PENALTIES,
    draws: int = 1,
    crop: int = 0,
    flip: bool = False,
) -> Measure:
    """What `select_features` scores cells by; the arguments are its own.

    Raises:
        ValueError: For an unknown metric, pooling or criterion, and settings that do not go together.
    """
    check_pooling(pooling)
    if isinstance(metric, str):
        trained = trained_heads(metric, pooling, criterion, draws, crop, flip)
        if trained is not None:
            return trained
    elif (draws, crop, flip) != (1, 0, False):
        raise ValueError("draws, crop and flip are settings of the measure that was passed as metric; set them there.")
    return make_measure(metric, pooling=pooling, criterion=criterion, penalties=tuple(penalties))


def _check(
    policies: Sequence[str],
    measure: Measure,
    seeds: Sequence[int],
    prompt: Any,
    class_labels: Any,
    max_layers: int,
    max_levels: int,
) -> None:
    for policy in policies:
        check_policy(policy)
    if not policies or len(set(policies)) < len(policies):
        raise ValueError(f"noise must name each policy once; got {list(policies)}.")
    if "clean" in policies and measure.draws_of("train") > 1 and not measure.augments:
        raise ValueError("Without noise every reading of an image is the same; take draws=1 with noise='clean'.")
    if measure.needs_encoder:
        raise ValueError(f"{measure.name!r} compares with an encoder; see `measure_alignment`.")
    if not isinstance(measure, LinearSums) and (max_layers, max_levels) != (1, 1):
        raise ValueError(
            f"Sets are grown from the sums of linear heads, which {measure.name!r} does not keep; pass max_layers=1 "
            "and max_levels=1 to score cells alone."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be at least one whole number, each once; got {list(seeds)}.")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt must be one string for all images; got {type(prompt).__name__}.")
    if class_labels is not None and (isinstance(class_labels, bool) or not isinstance(class_labels, int)):
        raise TypeError(
            "class_labels conditions the model and must be one id for all images; the labels of the task belong to "
            f"`train` and `validation`. Got {type(class_labels).__name__}."
        )
