"""`diffusers-repr probe MODEL DATASET`: fit a probe on features and save it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_repr.cli import options

OUT = options.Out("probe", ("probe.json",), replaced=True)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="pipeline folder or Hub id")
    parser.add_argument("dataset", help="folder of images or Parquet files, a Parquet file, or a Hub id")
    parser.add_argument("--out", required=True, help="folder for the probe")
    parser.add_argument("--layers", nargs="+", help="full module paths; `diffusers-repr layers MODEL` shows them")
    parser.add_argument("--timestep", type=float, nargs="+", help="larger is noisier; several are joined")
    parser.add_argument("--selection", help="folder that `diffusers-repr select` wrote, instead of the two above")
    parser.add_argument("--use", help="of the selection: best (the default), layers or levels")
    parser.add_argument("--head", default="linear", help="linear, mlp or knn")
    parser.add_argument("--protocol", help="lbfgs, ridge, adam, ddae, mae, repa or knn; the head's default if none")
    parser.add_argument("--pooling", help="mean (the default), max or adaptive:P")
    parser.add_argument("--noise", help="per_image (the default), shared, fresh or clean")
    parser.add_argument("--ensemble_size", type=int, help="noise draws an image")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--validation_split", help="'validation' if there is one; else part of train tunes the head")
    parser.add_argument("--test_split", help="measured once, at the end; 'test' if there is one")
    options.add_images(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward")
    parser.add_argument("--seed", type=int, help="of the noise and of fitting")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options.add_device(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Fit, measure, save and print."""
    settings = _settings(args)

    import datasets
    import torch

    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.heads import get_protocol
    from diffusers_repr.hub.schema import printable
    from diffusers_repr.sweep.selection import Selection
    from diffusers_repr.tasks import Probe

    get_protocol(args.protocol, args.head)
    if args.selection is not None:
        settings["selection"], settings["use"] = Selection.load(args.selection), args.use or "best"
    if args.quiet:
        datasets.disable_progress_bars()
    columns = (args.image_column, args.label_column)
    data = {"train": load_images(args.dataset, args.train_split, *columns)}
    for part in ("validation", "test"):
        named = getattr(args, f"{part}_split")
        if named is not None or _has_split(args.dataset, part):
            data[part] = load_images(args.dataset, named or part, *columns)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args))
    bar = None if args.quiet else _bar
    probe = Probe.fit(
        denoiser,
        data["train"],
        data.get("validation"),
        head=args.head,
        protocol=args.protocol,
        prompt=args.prompt,
        class_labels=args.class_label,
        batch_size=args.batch_size,
        progress_bar=bar,
        **settings,
    )
    if "test" in data:
        probe.evaluate(data["test"], progress_bar=bar)
    print(probe)
    for score in probe.recipe.scores:
        print(f"{printable(score.split):<12} {score.name:<18} {score.value:.4f}  ({score.rows} images)")
    options.save_or_keep(lambda folder: probe.save_pretrained(folder, title=Path(args.out).name), args.out, "probe")
    print(f"Saved to {args.out}")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the extractor that were given."""
    if (args.selection is None) == (args.layers is None and args.timestep is None):
        raise ValueError("Give --layers and --timestep, or --selection, not both.")
    if args.selection is None and (args.layers is None or args.timestep is None):
        raise ValueError("Give both --layers and --timestep; `diffusers-repr select` finds good ones.")
    if args.selection is None and args.use is not None:
        raise ValueError(f"--use {args.use} says what of a selection to take; give --selection too.")
    settings = {
        name: getattr(args, name)
        for name in ("layers", "pooling", "noise", "ensemble_size", "seed")
        if getattr(args, name) is not None
    }
    if args.timestep is not None:
        steps = [int(t) if t.is_integer() else t for t in args.timestep]
        settings["timestep"] = steps if len(steps) > 1 else steps[0]
    if args.image_size is not None:
        settings["image_size"] = options.image_size(args)
    return settings


def _has_split(dataset: str, split: str) -> bool:
    from pathlib import Path

    import datasets

    return not Path(dataset).is_file() and split in datasets.get_dataset_split_names(dataset)


def _bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="image", desc="features")
