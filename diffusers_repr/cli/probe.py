"""`diffusers-repr probe MODEL DATASET`: fit a probe on features and save it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

OUT = options.Out("probe", ("probe.json",), replaced=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting(REQUIRED, "folder for the probe")
    layers: list[str] | None = setting(None, "full module paths; `diffusers-repr layers MODEL` shows them")
    timestep: list[float] | None = setting(None, "larger is noisier; several are joined")
    selection: str | None = setting(None, "folder that `diffusers-repr select` wrote, instead of the two above")
    use: str | None = setting(None, "of the selection: best (the default), layers or levels")
    head: str = setting("linear", "linear, mlp or knn")
    protocol: str | None = setting(None, "lbfgs, ridge, adam, ddae, mae, repa or knn; the head's default if none")
    pooling: str | None = setting(None, "mean (the default), max or adaptive:P")
    noise: str | None = setting(None, "per_image (the default), shared, fresh or clean")
    ensemble_size: int | None = setting(None, "noise draws an image")
    train_split: str = setting("train", "of the data set")
    validation_split: str | None = setting(None, "'validation' if there is one; else part of train tunes the head")
    test_split: str | None = setting(None, "measured once, at the end; 'test' if there is one")
    batch_size: int = setting(64, "images a forward")
    seed: int | None = setting(None, "of the noise and of fitting")
    dtype: options.DType = setting("float32", "of the model")
    device: str | None = setting(None, "cuda, cpu, ...; an accelerator if there is one")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    quiet: bool = setting(False, "no progress bar")


def run(args: Settings) -> int:
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
    denoiser.pipe.to(options.device(args.device))
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


def _settings(args: Settings) -> dict[str, Any]:
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
        steps = options.numbers(args.timestep)
        settings["timestep"] = steps if len(steps) > 1 else steps[0]
    if args.image_size is not None:
        settings["image_size"] = options.sides(args.image_size)
    return settings


def _has_split(dataset: str, split: str) -> bool:
    from pathlib import Path

    import datasets

    return not Path(dataset).is_file() and split in datasets.get_dataset_split_names(dataset)


def _bar(total: int) -> Any:
    from diffusers_repr.store.progress import progress_bar

    return progress_bar(total, "features", "image")
