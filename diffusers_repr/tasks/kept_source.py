"""Sources of features with weights of their own: written into a task's folder, and made again when it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.pixel_source import PixelSource
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.heads import Hyperfeatures
from diffusers_repr.hub import read_json, write_json
from diffusers_repr.hub.places import public_name
from diffusers_repr.tasks.recipe import FeatureRecipe

FOLDER = "source"  # in the task's; the base is the task's own
PATTERNS = (f"{FOLDER}/config.json", f"{FOLDER}/*.safetensors", f"{FOLDER}/*.safetensors.index.json")
# Class, as the recipe names it -> what writes and reads it; a name that is not here is never looked up.
KEPT: Mapping[str, type[Hyperfeatures] | type[PixelSource]] = {
    "Hyperfeatures": Hyperfeatures,
    "PixelSource": PixelSource,
}


def keep_source(source: FeatureSource | None, folder: Path) -> None:
    """Write a source of `KEPT` into a task's folder; one of another class is passed again when the task is loaded."""
    made = KEPT.get(type(source).__name__)
    if made is None or not isinstance(source, made):
        return
    place = folder / FOLDER
    cast(Any, source).save_pretrained(place)
    config = read_json(place / "config.json")
    if config.get("base_model") is not None:  # no place of this machine; the task's recipe tells the base
        write_json(place / "config.json", {**config, "base_model": public_name(config["base_model"])})


def copy_source(task: Path, folder: Path) -> None:
    """Copy the source in a task's folder into another, where there is one."""
    if (task / FOLDER / "config.json").is_file():
        shutil.copytree(task / FOLDER, folder / FOLDER)


def kept_source(recipe: FeatureRecipe, folder: Path, denoiser: Denoiser, batch_size: int) -> FeatureSource | None:
    """The source in a task's folder on its base; None where it has none.

    Raises:
        FileNotFoundError: If the recipe's source is one that the folder should hold and it is not there.
        ValueError: If it is damaged, or made for another base.
    """
    made = KEPT.get(recipe.foreign or "")
    if made is None:
        return None
    if not (folder / FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"This {recipe.NOUN} was fitted on features of a {recipe.foreign}, and {str(folder)!r} has no {FOLDER}/ "
            "with it: save the task again where it was fitted, or pass it, source=..."
        )
    try:
        return made.from_pretrained(folder / FOLDER, denoiser, image_size=recipe.image_size, batch_size=batch_size)
    except (OSError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"The {recipe.foreign} in {str(folder / FOLDER)!r} is damaged ({type(error).__name__}: {error}). Save or "
            f"download the {recipe.NOUN} again."
        ) from error


__all__ = ["FOLDER", "KEPT", "PATTERNS", "copy_source", "keep_source", "kept_source"]
