"""`diffusers-repr select MODEL DATASET`: which noise level and layers suit a task."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.parts import open_parts
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.sweep.selection import Selection


OUT = options.Out("selection", ("selection.json",), again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings, options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    timesteps: list[float] = setting(REQUIRED, "levels to try; larger is noisier")
    out: str = setting(REQUIRED, "folder for selection.json, selection.parquet and heatmap.png")
    layers: list[str] | None = setting(None, "full module paths; default: all layers")
    metric: str = setting("accuracy", "accuracy, balanced_accuracy, neg_brier, r2 or neg_mse")
    pooling: str = setting("mean", "mean, max or adaptive:P")
    noise: list[str] = setting(["per_image"], "per_image, shared, fresh, clean; several: a third axis")
    criterion: str = setting("ridge", "ridge or lda; or ddae or adam: a head of gradient steps for every cell")
    draws: int = setting(1, "with ddae or adam: readings of train, each with other noise; epochs take turns")
    crop: int = setting(0, "with ddae or adam: pixels up to which a reading moves an image")
    flip: bool = setting(False, "with ddae or adam: a reading mirrors half the images")
    train_split: str = setting("train", "of the data set")
    validation_split: str | None = setting(
        None, "to score on; default: validation, if there is one; a test split is refused"
    )
    validation_fraction: float = setting(0.2, "of train to score on, if there is no validation split")
    batch_size: int = setting(64, "images a forward")
    test_fraction: float = setting(0.2, options.TEST_FRACTION)
    seed: int = setting(0, "of the noise")
    seeds: list[int] | None = setting(None, "of the noise of the best few; default: --seed and the two after it")
    split_seed: int = setting(0, options.SPLIT_SEED)
    limit: int | None = setting(None, options.LIMIT)
    max_layers: int | None = setting(None, "largest set of layers; default: 3, where sets are grown")
    max_levels: int | None = setting(None, "largest set of levels; default: 2, where sets are grown")
    tolerance: float = setting(0.005, "least gain for which a set grows")
    memory_gib: float = setting(4.0, "limit on the running sums")
    no_heatmap: bool = setting(False, "do not draw the picture (it needs matplotlib)")
    json: bool = setting(False, "print JSON instead of a table")
    overwrite: bool = setting(False, "replace a selection of another recipe in --out")


def run(args: Settings) -> int:
    """Select, save and print."""
    from diffusers_repr.pictures.figure import require_matplotlib
    from diffusers_repr.sweep.splits import open_splits, refuse_test

    if args.metric == "pck":
        raise ValueError(
            "--metric pck is measured on pairs of images with points, and DATASET has labels. In Python: "
            "select_features(denoiser, pairs, None, timesteps, metric='pck'); `diffusers-repr match --selection` "
            "reads what it saves."
        )
    refuse_test(args.train_split)
    refuse_test(args.validation_split or "validation")
    if not args.no_heatmap:
        require_matplotlib()  # before the work, not after
    parts = open_parts(args, measured=False, validate=args.validation_fraction)

    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.sweep.select import choose_measure, select_features

    trained: dict[str, Any] = {"draws": args.draws, "crop": args.crop, "flip": args.flip}
    measure = choose_measure(args.metric, args.pooling, args.criterion, **trained)
    open_splits(parts["train"], parts["validation"], measure)  # refuses data before the model is loaded
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    image_size = options.sides(args.image_size)
    options.tell_size(denoiser, image_size, aside=args.json)
    selection = select_features(
        denoiser,
        parts["train"],
        parts["validation"],
        options.numbers(args.timesteps),
        args.layers,
        args.metric,
        args.pooling,
        args.noise,
        args.batch_size,
        criterion=args.criterion,
        **trained,
        prompt=args.prompt,
        class_labels=args.class_label,
        image_size=image_size,
        seeds=args.seeds or [args.seed, args.seed + 1, args.seed + 2],
        max_layers=args.max_layers,
        max_levels=args.max_levels,
        tolerance=args.tolerance,
        memory_gib=args.memory_gib,
        progress=not args.quiet,
    )
    _print_json(selection, args.out) if args.json else _print(selection)
    save_result(args, "selection", lambda folder: selection.save(folder, heatmap=not args.no_heatmap))
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0


def _print_json(selection: Selection, out: str) -> None:
    """The best cell, the best few and the sets, in one line."""
    names = ("layer", "timestep", "noise", "mean", "std", "flops_share")
    cells = [{name: getattr(cell, name) for name in names} for cell in selection.finalists]
    sets = {
        name: {"layers": found.layers, "timesteps": found.timesteps, "score": found.score}
        for name, found in selection.sets.items()
    }
    print(json.dumps({"out": out, "metric": selection.metric, "best": cells[0], "finalists": cells, "sets": sets}))


def _print(selection: Selection) -> None:
    width, (metric, sign) = max(len(cell.layer) for cell in selection.finalists), selection.in_words()
    how = "mean ± std of noise seeds" if sign > 0 else "lower is better; mean ± std of noise seeds"
    print(f"{'layer':<{width}}  {'timestep':>8}  {'noise':<9}  {metric} ({how})  FLOPs")
    for cell in selection.finalists:
        score = f"{sign * (cell.mean or 0.0):.4f} ± {cell.std:.4f}"
        print(f"{cell.layer:<{width}}  {cell.timestep:>8g}  {cell.noise:<9}  {score}  {cell.flops_share:.0%}")
    for name, found in selection.sets.items():
        levels = ", ".join(f"{t:g}" for t in found.timesteps)
        alone = "" if len(found.steps) > 1 else "  (nothing was added)"
        print(f"set of {name}: {', '.join(found.layers)} at {levels}: {sign * found.score:.4f}{alone}")
