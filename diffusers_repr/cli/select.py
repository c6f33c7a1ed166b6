"""`diffusers-repr select MODEL DATASET`: which noise level and layers suit a task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_repr.cli import options

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData
    from diffusers_repr.sweep.selection import Selection


OUT = options.Out("selection", ("selection.json",))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="pipeline folder or Hub id")
    parser.add_argument("dataset", help="folder of images or Parquet files, a Parquet file, or a Hub id")
    parser.add_argument("--timesteps", type=float, nargs="+", required=True, help="levels to try; larger is noisier")
    parser.add_argument("--out", required=True, help="folder for selection.json, selection.parquet and heatmap.png")
    parser.add_argument("--layers", nargs="+", help="full module paths; all layers if not given")
    parser.add_argument("--metric", default="accuracy", help="accuracy, balanced_accuracy, neg_brier, r2 or neg_mse")
    parser.add_argument("--pooling", default="mean", help="mean, max or adaptive:P")
    parser.add_argument(
        "--noise", nargs="+", default=["per_image"], help="per_image, shared, fresh, clean; several: a third axis"
    )
    parser.add_argument("--criterion", default="ridge", help="ridge or lda")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--validation_split", help="'validation' if there is one; a test split is refused")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.2, help="of train, if there is no validation split"
    )
    options.add_images(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--max_layers", type=int, default=3, help="largest set of layers")
    parser.add_argument("--max_levels", type=int, default=2, help="largest set of levels")
    parser.add_argument("--tolerance", type=float, default=0.005, help="least gain for which a set grows")
    parser.add_argument("--memory_gib", type=float, default=4.0, help="limit on the running sums")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options.add_device(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--no_heatmap", action="store_true", help="do not draw the picture (it needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
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
    denoiser.pipe.to(options.device(args))
    selection = select_features(
        denoiser,
        train,
        validation,
        [int(t) if t.is_integer() else t for t in args.timesteps],
        args.layers,
        args.metric,
        args.pooling,
        args.noise,
        args.batch_size,
        criterion=args.criterion,
        prompt=args.prompt,
        class_labels=args.class_label,
        image_size=options.image_size(args),
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


def _splits(args: argparse.Namespace) -> tuple[ImageData, ImageData]:
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
