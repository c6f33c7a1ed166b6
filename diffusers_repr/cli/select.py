"""`diffusers-repr select MODEL DATASET`: which noise level and layers suit a task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData
    from diffusers_repr.sweep.selection import Selection


OUT = options.Out("selection", ("selection.json",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    timesteps: list[float] = setting(REQUIRED, "levels to try; larger is noisier")
    out: str = setting(REQUIRED, "folder for selection.json, selection.parquet and heatmap.png")
    layers: list[str] | None = setting(None, "full module paths; all layers if not given")
    metric: str = setting("accuracy", "accuracy, balanced_accuracy, neg_brier, r2 or neg_mse")
    pooling: str = setting("mean", "mean, max or adaptive:P")
    noise: list[str] = setting(["per_image"], "per_image, shared, fresh, clean; several: a third axis")
    criterion: str = setting("ridge", "ridge or lda")
    train_split: str = setting("train", "of the data set")
    validation_split: str | None = setting(None, "'validation' if there is one; a test split is refused")
    validation_fraction: float = setting(0.2, "of train, if there is no validation split")
    batch_size: int = setting(64, "images a forward")
    seeds: list[int] = setting([0, 1, 2], "of the noise")
    max_layers: int = setting(3, "largest set of layers")
    max_levels: int = setting(2, "largest set of levels")
    tolerance: float = setting(0.005, "least gain for which a set grows")
    memory_gib: float = setting(4.0, "limit on the running sums")
    dtype: options.DType = setting("float32", "of the model")
    device: str | None = setting(None, "cuda, cpu, ...; an accelerator if there is one")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    no_heatmap: bool = setting(False, "do not draw the picture (it needs matplotlib)")
    quiet: bool = setting(False, "no progress bar")


def run(args: Settings) -> int:
    """Select, save and print."""
    from diffusers_repr.sweep.picture import require_matplotlib
    from diffusers_repr.sweep.splits import refuse_test

    refuse_test(args.train_split)
    refuse_test(args.validation_split or "validation")
    if not args.no_heatmap:
        require_matplotlib()  # before the work, not after
    train, validation = _splits(args)

    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.sweep.select import select_features

    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    image_size = options.sides(args.image_size)
    options.tell_size(denoiser, image_size)
    selection = select_features(
        denoiser,
        train,
        validation,
        options.numbers(args.timesteps),
        args.layers,
        args.metric,
        args.pooling,
        args.noise,
        args.batch_size,
        criterion=args.criterion,
        prompt=args.prompt,
        class_labels=args.class_label,
        image_size=image_size,
        seeds=args.seeds,
        max_layers=args.max_layers,
        max_levels=args.max_levels,
        tolerance=args.tolerance,
        memory_gib=args.memory_gib,
        progress=not args.quiet,
    )
    _print(selection)
    options.save_or_keep(lambda folder: selection.save(folder, heatmap=not args.no_heatmap), args.out, "selection")
    print(f"Saved to {args.out}")
    return 0


def _splits(args: Settings) -> tuple[ImageData, ImageData]:
    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.sweep.splits import hold_out

    columns = (args.image_column, args.label_column)
    train = load_images(args.dataset, args.train_split, *columns)
    if args.validation_split is not None:
        return train, load_images(args.dataset, args.validation_split, *columns)
    if not _one_split(Path(args.dataset)):
        try:
            return train, load_images(args.dataset, "validation", *columns)
        except ValueError as error:
            if "has no split 'validation'" not in str(error):
                raise
    train, validation = hold_out(train, args.validation_fraction)
    print(f"No split 'validation': held out {len(validation)} of {len(train) + len(validation)} training images.")
    return train, validation


def _one_split(path: Path) -> bool:
    """Whether this is one Parquet file, or a single split of `save_to_disk`, which answers to every name."""
    return path.is_file() or (path / "state.json").is_file()


def _print(selection: Selection) -> None:
    width = max(len(cell.layer) for cell in selection.finalists)
    print(f"{'layer':<{width}}  {'timestep':>8}  {'noise':<9}  {selection.metric} (mean ± std of noise seeds)  FLOPs")
    for cell in selection.finalists:
        score = f"{cell.mean:.4f} ± {cell.std:.4f}"
        print(f"{cell.layer:<{width}}  {cell.timestep:>8g}  {cell.noise:<9}  {score}  {cell.flops_share:.0%}")
    for name, found in selection.sets.items():
        levels = ", ".join(f"{t:g}" for t in found.timesteps)
        alone = "" if len(found.steps) > 1 else "  (nothing was added)"
        print(f"set of {name}: {', '.join(found.layers)} at {levels}: {found.score:.4f}{alone}")
