"""`diffusers-repr classify MODEL IMAGES --prompts ...`: name what is on images, without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.cli.saved_task import find_images
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.tasks import ZeroShotClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "images")

    model: str = setting(REQUIRED, "pipeline folder or Hub id, or that of a saved zero-shot classifier")
    images: list[str] = setting(REQUIRED, "image files, or folders that are searched for them")
    prompts: list[str] | None = setting(None, "one a class, which it also names")
    classes: list[str] | None = setting(None, "names, put into --template; of a class-conditional model names or ids")
    template: list[str] | None = setting(None, "with {} for the name; several: several prompts a class")
    rule: str = setting("racing", "racing, averaging, or a data set of the paper's schedules: cifar10, pets, ...")
    error: float | None = setting(None, "of racing: probability of a wrong elimination; default: 0.05")
    loss: Literal["l2", "l1", "huber", "vlb"] | None = setting(None, "of noises; default: the rule's, or l2")
    ensemble: Literal["mean", "best"] = setting("mean", "how several prompts of a class count")
    image_size: list[str] | None = setting(None, options.IMAGE_SIZE)
    stretch: bool = setting(False, "bring both sides to size; default: crop the middle")
    seed: int = setting(0, "of the noise")
    batch_size: int = setting(64, "rows a forward; fewer where memory does not suffice")
    top: int = setting(5, "classes shown an image")
    limit: int | None = setting(None, "the first images only, for a quick try; default: all")
    pictures: str | None = setting(None, "folder for a picture of the errors by level of each image")
    save: str | None = setting(None, "folder for the classifier itself, to be loaded or pushed")
    base: str | None = setting(None, "of a saved classifier: folder or Hub id of the model, for the recorded one")
    json: bool = setting(False, "print JSON lines instead of a table")

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if self.prompts is not None and (self.classes is not None or self.template is not None):
            raise ValueError("--prompts are whole; leave out --classes and --template.")
        if self.error is not None and self.rule != "racing":
            raise ValueError(f"--error is of --rule racing; --rule {self.rule} has none.")


def run(args: Settings) -> int:
    """Load, classify and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    from diffusers_repr.data.image_files import read_image

    classifier = _classifier(args)
    classifier.to(options.device(args.device))
    if args.save is not None:
        classifier.save_pretrained(args.save)
    width, evaluations = max(len(str(file)) for file in files), 0
    for start in range(0, len(files), 16):
        part = files[start : start + 16]
        images = [read_image(file, "The image") for file in part]
        output = classifier(images)
        evaluations += int(output.evaluations.sum())
        _print(part, output, args, width)
        if args.pictures is not None:
            _draw(Path(args.pictures), start, part, images, output)
    options.say(f"{evaluations} network evaluations, {evaluations / len(files):.1f} an image", aside=args.json)
    return 0


def _classifier(args: Settings) -> ZeroShotClassifier:
    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.tasks import ZeroShotClassifier
    from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe

    dtype = getattr(torch, args.dtype)
    if (Path(args.model) / ZeroShotRecipe.FILE).is_file() or args.base is not None:
        own = [name for name in ("prompts", "classes", "template", "loss") if getattr(args, name) is not None]
        if own:
            raise ValueError(f"{args.model!r} is a saved classifier with its own {own[0]}; leave out --{own[0]}.")
        return ZeroShotClassifier.from_pretrained(
            args.model, args.base, args.revision, batch_size=args.batch_size, dtype=dtype
        )
    denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    denoiser.pipe.to(options.device(args.device))
    options_given: dict[str, Any] = {} if args.template is None else {"template": args.template}
    return ZeroShotClassifier.of(
        denoiser,
        _classes(args),
        rule=_rule(args),
        loss=args.loss,
        ensemble=args.ensemble,
        image_size=options.sides(args.image_size),
        resize="stretch" if args.stretch else "crop",
        seed=args.seed,
        batch_size=args.batch_size,
        **options_given,
    )


def _classes(args: Settings) -> Any:
    if args.prompts is not None:
        twice = [text for text in args.prompts if args.prompts.count(text) > 1]
        if twice:
            raise ValueError(f"--prompts has {twice[0]!r} twice: equal ones cannot be told apart. Leave one out.")
        return {text: text for text in args.prompts}
    if args.classes is None:
        return None
    return [int(word) if word.isascii() and word.isdigit() else word for word in args.classes]


def _rule(args: Settings) -> Any:
    if args.error is None:
        return args.rule
    from diffusers_repr.tasks.denoising_errors.presets import RACING

    return dataclasses.replace(RACING, error=args.error)


def _print(files: Sequence[Path], output: Any, args: Settings, width: int) -> None:
    from diffusers_repr.hub.schema import printable

    tops = output.top(args.top)
    for at, (file, top) in enumerate(zip(files, tops, strict=True)):
        sure, took = float(output.confidence[at]), int(output.evaluations[at])
        if args.json:
            row = {"image": str(file), "label": output.labels[at], "confidence": sure, "evaluations": took}
            if output.decided is not None:
                row["decided"] = bool(output.decided[at])
            row["top"] = [{"label": name, "error": value} for name, value in top]
            print(json.dumps(row))
        else:
            classes = "  ".join(f"{printable(name)} {value:.5f}" for name, value in top)
            print(f"{printable(str(file)):<{width}}  confidence {sure:.3f}  {classes}")


def _draw(folder: Path, start: int, files: Sequence[Path], images: Sequence[Any], output: Any) -> None:
    from diffusers_repr.hub.files import atomic_write
    from diffusers_repr.pictures.figure import png_of

    folder.mkdir(parents=True, exist_ok=True)
    for at, (file, image) in enumerate(zip(files, images, strict=True)):
        atomic_write(folder / f"{start + at:04d}-{file.stem}.png", png_of(output.plot(at, image)))
