"""`diffusers-repr generate RECIPE.yaml --out DIR`: images of classes, of prompts, or variants of images.

    diffusers-repr generate examples/configs/generate/digits_classes.yaml --out generated
    accelerate launch -m diffusers_repr generate variants.yaml --out variants

Every image is recorded with all that decides it and made once; the processes share the work, and the same command run
again goes on where it stopped. `datasets.load_dataset("DIR")` reads the result.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from PIL import Image

    from diffusers_repr.store.image_store import ImageKey
    from diffusers_repr.synthesis.recipe import GenerationRecipe

# Settings that may name a place of this machine.
PLACES = ("model", "prompts", "dataset_name", "encoder", "assigner", "controlnet")
OUT = options.Out("store of images", ("manifest.json",), again="resumed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("recipe",)

    recipe: str = setting(REQUIRED, "YAML file: model, method, count, and what the method needs")
    out: str = setting(REQUIRED, "folder of the result; the same command resumes it")
    batch_size: int = setting(32, "images of one process and call")
    shard_size: int | None = setting(None, "images of a file, which a stopped run makes anew; default: at most 1000")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "delete the images in --out first")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}.")


def run(args: Settings) -> int:
    """Make what is not there yet, and say what it took; what is there is known by its sources, without a model."""
    from accelerate.utils import gather_object

    from diffusers_repr.hub.places import public_name, without_places
    from diffusers_repr.store.image_store import is_image_store, write_images
    from diffusers_repr.store.processes import process_state
    from diffusers_repr.synthesis.recipe import open_maker, read_generation
    from diffusers_repr.synthesis.sources import made_already, sources_hash

    recipe, state = read_generation(args.recipe), process_state()
    _check_made(Path(args.recipe), recipe)
    sources = gather_object([sources_hash(recipe) if state.is_main_process else None])[0]
    found = made_already(args.out, sources) if state.is_main_process and not args.overwrite else None
    if gather_object([found is not None])[0]:
        if found is not None:
            print(f"{len(found)} images are in {args.out} already; nothing is left to be made.")
        return 0
    with state.main_process_first():
        maker, keys = open_maker(recipe, args.device or str(state.device))
        # A folder of another kind has a manifest.json and data/, too: nothing of it is deleted.
        if args.overwrite and state.is_main_process and is_image_store(Path(args.out)):
            shutil.rmtree(Path(args.out) / "data", ignore_errors=True)
            for name in ("manifest.json", "README.md"):
                (Path(args.out) / name).unlink(missing_ok=True)
    asked, since, made = keys(), time.perf_counter(), [0]

    def make(some: Sequence[ImageKey]) -> Sequence[Image.Image]:
        made[0] += len(some)
        return maker(some)

    chosen: dict[str, Any] = {"batch_size": args.batch_size, "shard_size": args.shard_size, "progress": not args.quiet}
    # The manifest is published with the images: it names no place of this machine.
    told = dataclasses.asdict(recipe)
    told |= {k: told[k] and public_name(told[k]) for k in PLACES} | {"guidance": without_places(told["guidance"])}
    about = {"recipe": told} | ({"sources": sources} if sources else {})
    try:
        store = write_images(args.out, asked, make, about=about, **chosen)
    except FileExistsError as error:
        raise FileExistsError(f"{error} {_changed(args.out, told)}--overwrite deletes what is there first.") from error
    count, seconds = sum(gather_object(made)), time.perf_counter() - since
    if state.is_main_process:
        speed = f"{count} made now: {count / max(seconds, 1e-9):.1f} a second" if count else "all were there already"
        print(f"{len(store)} images of {maker.name} in {args.out}, {speed}")
    return 0


def _check_made(path: Path, recipe: GenerationRecipe) -> None:
    """Say of a folder that is not there what makes it, where the comments of the recipe tell."""
    from diffusers_repr.config.made import how_made

    for name in PLACES:
        value = getattr(recipe, name)
        if value is not None and not Path(value).expanduser().exists():
            hint = how_made(value, [path])
            if hint is not None:
                raise FileNotFoundError(f"`{name}`: there is no {value!r} here. {hint}")


def _changed(out: str, told: dict[str, Any]) -> str:
    """Which settings differ from those of the store that is there: its keys tell that alone by their hash."""
    from diffusers_repr.store.image_store import ImageStore, is_image_store
    from diffusers_repr.store.manifest import recipe_differences

    there = ImageStore.read_manifest(Path(out))["about"].get("recipe") if is_image_store(Path(out)) else None
    if not isinstance(there, dict):
        return ""
    found = recipe_differences(there, {key: told.get(key) for key in there})
    if not found:
        return "The recipes are the same; the model, its images or this library are others. "
    return f"Of the recipe: {'; '.join(found)}. "
