"""`diffusers-repr compare MODEL DATASET`: all heads on one base under one protocol, and which to take."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.parts import as_selected, open_parts, refuse_seen
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, json_mapping, setting

OUT = options.Out("comparison", ("comparison.json",), again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings, options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting(REQUIRED, "folder for comparison.json, comparison.md and comparison.png")
    timesteps: list[float] | None = setting(None, "levels to choose from; larger is noisier")
    selection: str | None = setting(None, "folder that `diffusers-repr select` wrote, instead of --timesteps")
    heads: list[str] | None = setting(
        None, "some of linear, mlp, knn, convolution, attention, difformer, diffeed; default: all"
    )
    head_options: dict | str | None = setting(None, "head -> arguments of its class, a mapping (JSON in a flag)")
    shares: list[float] = setting([0.01, 0.1, 1.0], "of the training labels")
    seeds: list[int] = setting([0, 1, 2], "of labels, noise, first weights and order")
    epochs: int = setting(30, "with all labels; with fewer, more, so that there are as many steps")
    learning_rate: float = setting(1e-3, "of Adam, of every head of gradient steps")
    map_size: int = setting(8, "cells a side to which maps are averaged, at most")
    train_split: str = setting("train", "of the data set")
    validation_split: str | None = setting(None, "to choose layer and level on; default: validation, if there is one")
    validation_fraction: float = setting(0.2, "of train to choose on, if there is no validation split")
    test_split: str | None = setting(None, "to measure on; default: test, if there is one")
    test_fraction: float = setting(0.2, options.TEST_FRACTION)
    batch_size: int = setting(64, "images a forward")
    split_seed: int = setting(0, options.SPLIT_SEED)
    limit: int | None = setting(None, options.LIMIT)
    no_plot: bool = setting(False, "do not draw the picture (it needs matplotlib)")
    json: bool = setting(False, "print JSON instead of a table")
    overwrite: bool = setting(False, "replace a comparison of another recipe in --out")


def run(args: Settings) -> int:
    """Choose the place, fit every head, save and print."""
    from diffusers_repr.pictures.figure import require_matplotlib

    if (args.selection is None) == (args.timesteps is None):
        raise ValueError("Give --timesteps, levels to choose from, or --selection, what `select` chose; not both.")
    if not args.no_plot:
        require_matplotlib()  # before the work, not after
    head_options = json_mapping("head_options", args.head_options)
    parts = open_parts(as_selected(args), measured=True, validate=args.validation_fraction)
    if "test" not in parts:
        raise ValueError("There is nothing to measure on: name a --test_split, or set --test_fraction above 0.")

    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.heads import PROTOCOLS
    from diffusers_repr.heads.fitting.protocols import MinibatchProtocol
    from diffusers_repr.sweep.select import select_features
    from diffusers_repr.sweep.selection import Selection
    from diffusers_repr.tasks.compare_heads import HEADS, compare_heads

    selection = None if args.selection is None else Selection.load(args.selection)
    if selection is not None:
        refuse_seen(selection, parts)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    size = options.sides(args.image_size)
    options.tell_size(denoiser, size, aside=args.json)
    reading: dict[str, Any] = {"prompt": args.prompt, "class_labels": args.class_label, "image_size": size}
    if selection is None:
        assert args.timesteps is not None
        selection = select_features(
            denoiser, parts["train"], parts["validation"], options.numbers(args.timesteps), max_layers=1, max_levels=1,
            batch_size=args.batch_size, seeds=args.seeds, progress=not args.quiet, **reading,
        )  # fmt: skip
    protocol = PROTOCOLS["adam-maps"].replace(learning_rate=args.learning_rate)
    assert isinstance(protocol, MinibatchProtocol)
    comparison = compare_heads(
        denoiser, parts["train"], parts["test"], selection, heads=args.heads or list(HEADS), shares=args.shares,
        seeds=args.seeds, epochs=args.epochs, head_options=head_options, map_size=args.map_size,
        protocol=protocol, batch_size=args.batch_size,
        progress=None if args.quiet else lambda line: options.say(line, aside=args.json), **reading,
    )  # fmt: skip
    print(json.dumps(comparison.to_dict()) if args.json else f"{comparison.table()}\n\n{comparison.words()}")
    save_result(args, "comparison", lambda folder: comparison.save(folder, plot=not args.no_plot))
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0
