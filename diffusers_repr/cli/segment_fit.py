"""`diffusers-repr segment fit MODEL DATASET`: learn the classes of pixels from a few images with masks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.cli.recorded import save_result
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData

OUT = options.Out("segmenter", ("segmentation.json",), replaced=True, again="same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images with a metadata.jsonl, of Parquet files, or a Hub id")
    out: str = setting(REQUIRED, "folder for the segmenter")
    layers: list[str] | None = setting(
        None, "full module paths; default: the last residual block of every decoder stage"
    )
    timesteps: list[float] | None = setting(None, "levels, larger is noisier; default: three, as in the paper")
    preset: str | None = setting(None, "layers, levels and size of a paper: ddpm-seg; default: none")
    noise: str | None = setting(None, "shared, per_image, fresh or clean; default: shared, as in the paper")
    ensemble_size: int | None = setting(None, "noise draws an image; default: 1")
    members: int = setting(10, "networks that vote")
    max_epochs: int = setting(100, "passes over the pixels at most")
    mask_column: str = setting("mask", "of the masks")
    mask_names: list[str] | None = setting(None, "of the classes, in the order of their ids; default: the ids")
    ignore_index: int = setting(255, "id of pixels of no class")
    image_column: str | None = setting(None, "of the images; default: found by type")
    prompt: str | None = setting(None, "one for all images; default: the empty one")
    class_label: int | None = setting(
        None, "of class-conditional models, one for all images; default: the null class, if it has one"
    )
    image_size: list[str] | None = setting(None, options.IMAGE_SIZE)
    train_split: str = setting("train", "of the data set")
    test_split: str | None = setting(None, "to measure on, once, at the end; default: test, if there is one")
    store_dtype: Literal["float32", "float16"] = setting("float32", "of the features in memory")
    batch_size: int = setting(8, "images a forward")
    seed: int | None = setting(None, "of the noise and of fitting; default: 0")
    limit: int | None = setting(None, "the first images of each split only, for a quick try; default: all")
    json: bool = setting(False, "print JSON instead of lines")
    overwrite: bool = setting(False, "replace a segmenter of another recipe in --out")


def run(args: Settings) -> int:
    """Fit, measure, save and print."""
    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.heads.fitting.pixels import DDPM_SEG
    from diffusers_repr.tasks import Segmenter

    protocol = DDPM_SEG.replace(max_epochs=args.max_epochs)
    parts = _open(args)
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    denoiser.pipe.to(options.device(args.device))
    settings = options.reading(args, ("layers", "noise", "ensemble_size", "seed"))
    if args.preset is None:
        options.tell_size(denoiser, settings.get("image_size"), aside=args.json)
    bar = options.bar(args.quiet, "segment", "step")
    segmenter = Segmenter.fit(
        denoiser,
        parts["train"],
        preset=args.preset,
        members=args.members,
        protocol=protocol,
        prompt=args.prompt,
        class_labels=args.class_label,
        store_dtype=args.store_dtype,
        batch_size=args.batch_size,
        progress_bar=bar,
        **settings,
    )
    measured = segmenter.evaluate(parts["test"], progress_bar=bar) if "test" in parts else {}
    _print(segmenter, measured, args)
    save_result(args, "segmenter", lambda folder: segmenter.save_pretrained(folder, title=Path(args.out).name))
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0


def _print(segmenter: Any, measured: dict[str, float], args: Settings) -> None:
    from diffusers_repr.hub.schema import printable

    recipe = segmenter.recipe
    if args.json:
        found = {"layers": recipe.layers, "timesteps": [level.timestep for level in recipe.levels]}
        print(json.dumps({"out": args.out, **found, "label_names": recipe.label_names, "measured": measured}))
        return
    print(segmenter)
    for name, value in measured.items():
        print(f"{printable(name)} {value:.4f}" if name != "rows" else f"images {value}")


def _open(args: Settings) -> dict[str, ImageData]:
    """The split to learn from, and that to measure on, where there is one."""
    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.data.splits import has_split

    splits = {"train": args.train_split}
    test = args.test_split or "test"
    if args.test_split is not None or has_split(args.dataset, test):
        splits["test"] = test
    parts = {}
    for part, split in splits.items():
        data = load_images(
            args.dataset,
            split,
            args.image_column,
            mask_column=args.mask_column,
            mask_names=args.mask_names,
            ignore_index=args.ignore_index,
        )
        parts[part] = data if args.limit is None else data.select(range(min(args.limit, len(data))))
    return parts
