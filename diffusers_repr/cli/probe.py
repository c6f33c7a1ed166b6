"""`diffusers-repr probe MODEL DATASET`: fit a probe on features and save it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.parts import as_selected, open_parts, refuse_seen
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.tasks import Probe

OUT = options.Out("probe", ("probe.json",), replaced=True, again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ImageSettings, options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")
    EARLIER_KEYS: ClassVar = {"timestep": "timesteps"}

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting(REQUIRED, "folder for the probe")
    layers: list[str] | None = setting(None, "full module paths; `diffusers-repr layers MODEL` shows them")
    timesteps: list[float] | None = setting(None, "levels, whose features are joined; larger is noisier")
    selection: str | None = setting(
        None, "folder that `diffusers-repr select` wrote, instead of --layers and --timesteps"
    )
    use: str | None = setting(None, "of the selection: best, layers or levels; default: best")
    head: str = setting("linear", "linear, mlp, knn; on maps attention or convolution")
    protocol: str | None = setting(None, "lbfgs, ridge, adam, adam-maps, ddae, gdc, ...; default: that of the head")
    pooling: str | None = setting(None, "mean, max or adaptive:P; of heads on maps map:P; default: mean, or map:16")
    noise: str | None = setting(
        None, "per_image, shared, fresh or clean; default: per_image, or that of the selection"
    )
    ensemble_size: int | None = setting(None, "noise draws an image; default: 1")
    train_split: str = setting("train", "of the data set")
    validation_split: str | None = setting(
        None, "to tune the head on; default: that of the selection, or validation, if there is one"
    )
    test_split: str | None = setting(None, "to measure on, once, at the end; default: test, if there is one")
    batch_size: int = setting(64, "images a forward")
    test_fraction: float = setting(0.2, options.TEST_FRACTION)
    seed: int | None = setting(None, "of the noise and of fitting; default: 0, or that of the selection")
    split_seed: int = setting(0, options.SPLIT_SEED)
    limit: int | None = setting(None, options.LIMIT)
    json: bool = setting(False, "print JSON instead of lines")
    overwrite: bool = setting(False, "replace a probe of another recipe in --out")


def run(args: Settings) -> int:
    """Fit, measure, save and print."""
    settings = _settings(args)

    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.heads import get_protocol
    from diffusers_repr.sweep.selection import Selection
    from diffusers_repr.tasks import Probe
    from diffusers_repr.tasks.images import class_data
    from diffusers_repr.tasks.probe_fit import check_labels, open_classes

    get_protocol(args.protocol, args.head)
    if args.selection is not None:
        settings["selection"], settings["use"] = Selection.load(args.selection), args.use or "best"
    parts = open_parts(as_selected(args), measured=True)
    if args.selection is not None:
        refuse_seen(settings["selection"], parts)
    train, validation, names = open_classes(parts["train"], parts.get("validation"))
    test = class_data(parts["test"], "test") if "test" in parts else None
    if test is not None:
        check_labels(test, names)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    if args.selection is None:
        options.tell_size(denoiser, settings.get("image_size"), aside=args.json)
    bar = options.bar(args.quiet, "features", "image")
    probe = Probe.fit(
        denoiser,
        train,
        validation,
        head=args.head,
        protocol=args.protocol,
        prompt=args.prompt,
        class_labels=args.class_label,
        batch_size=args.batch_size,
        progress_bar=bar,
        **settings,
    )
    if test is not None:
        probe.evaluate(test, progress_bar=bar)
    _print(probe, args)
    save_result(args, "probe", lambda folder: probe.save_pretrained(folder, title=Path(args.out).name))
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0


def _print(probe: Probe, args: Settings) -> None:
    """What was fitted, and its scores."""
    from diffusers_repr.hub.schema import printable

    recipe = probe.recipe
    if args.json:
        found = {"layers": recipe.layers, "timesteps": [level.timestep for level in recipe.levels]}
        scores = [dataclasses.asdict(score) for score in recipe.scores]
        print(json.dumps({"out": args.out, **found, "label_names": recipe.label_names, "scores": scores}))
        return
    print(probe)
    for score in recipe.scores:
        print(f"{printable(score.split)}: {score.name} {score.value:.4f} ({score.rows} images)")


def _settings(args: Settings) -> dict[str, Any]:
    """Settings of the extractor that were given."""
    if (args.selection is None) == (args.layers is None and args.timesteps is None):
        raise ValueError(
            "Give --layers and --timesteps, or --selection, not both. `diffusers-repr layers MODEL` lists layers, and "
            "`diffusers-repr select` finds the best layer and level."
        )
    if args.selection is None and (args.layers is None or args.timesteps is None):
        raise ValueError("Give both --layers and --timesteps; `diffusers-repr select` finds good ones.")
    if args.selection is None and args.use is not None:
        raise ValueError(f"--use {args.use} says what of a selection to take; give --selection too.")
    return options.reading(args, ("layers", "pooling", "noise", "ensemble_size", "seed"))
