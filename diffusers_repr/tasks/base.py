"""The model under a task: recorded when its head is fitted, found and checked when it is loaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.record import base_record, config_defaults
from diffusers_repr.hub import HubError, is_repo_id
from diffusers_repr.hub import base_record as bases
from diffusers_repr.hub.base_record import BaseRecord, Dependent, Level, called
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.places import is_place, last_name
from diffusers_repr.tasks.recipe import FeatureRecipe
from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe

_GREY = (64, 64)  # pixels of an image of a model that tells no size of its own
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


def _dependent(recipe: FeatureRecipe | ZeroShotRecipe) -> Dependent:
    remedy = f"Pass the model it was fitted on as base=..., or fit a new {recipe.NOUN}."
    return Dependent(recipe.NOUN, recipe.NOUN, "fitted", remedy)


def record_base(
    denoiser: Denoiser, features: Mapping[str, int], name: str | None = None, revision: str | None = None
) -> BaseRecord:
    """What is written of a base.

    Args:
        denoiser: The base.
        features: Layer -> values of its pooled feature, or channels of its map.
        name: Hub id or folder to write instead of the one it was loaded from.
        revision: Goes with `name`.
    """
    found = base_record(denoiser)
    if name is None:
        place = named_place(found.name, found.revision, str(denoiser.config.get("_name_or_path", "")))
    else:
        place = named_place(name, revision)
    return BaseRecord(
        **place, model_class=found.model_class, config=found.config, features=dict(features), marks=found.marks
    )


def named_place(name: str | None, revision: str | None = None, cached: str | None = None) -> dict[str, Any]:
    """Where a model is found again: `name`, `local`, `revision` and `commit` of its record.

    Args:
        name: Hub id or folder.
        revision: Of the Hub id.
        cached: Folder that it was read from; in the Hub's cache it tells id and commit. None: `name` as it is.
    """
    commit = None
    for path in () if cached is None else (cached, name or ""):
        snapshot = _SNAPSHOT.search(path)
        if snapshot:
            name, commit = snapshot[1].replace("--", "/"), snapshot[2]
    local = name is not None and (Path(name).expanduser().is_dir() or not is_repo_id(name))
    return {"name": name, "local": local, "revision": revision, "commit": commit}


def written_base(base: BaseRecord, folder: Path | None) -> BaseRecord:
    """The record as a file holds it: no absolute place of this machine.

    Args:
        base: As it is in memory.
        folder: Of the task: a base elsewhere on this disk is told as the way from there. None, for what is shared:
            of every folder the last name alone.
    """
    if base.name is None or not base.local or (folder is not None and not is_place(base.name)):
        return base
    place = Path(base.name).expanduser()
    if folder is None or not place.is_dir():
        return replace(base, name=last_name(base.name))
    try:
        way = Path(os.path.relpath(os.path.abspath(place), os.path.abspath(folder))).as_posix()
    except ValueError:  # another drive
        return replace(base, name=last_name(base.name))
    return replace(base, name=way if way.startswith(".") else f"./{way}")


def found_base(base: BaseRecord, task: Path) -> BaseRecord:
    """The record as it is in memory: where it tells the way from the task's folder, the place it leads to."""
    if base.name is None or not base.local or not base.name.startswith("."):
        return base
    place = Path(os.path.normpath(os.path.join(os.path.abspath(task), base.name)))
    return replace(base, name=str(place)) if place.is_dir() else base


def open_base(
    recipe: FeatureRecipe | ZeroShotRecipe,
    task: Path,
    base: Any = None,
    revision: str | None = None,
    head: Any = None,
    **kwargs: Any,
) -> Denoiser:
    """The base of a task, checked.

    Args:
        recipe: The task's recipe.
        task: Its folder; a relative base folder is also looked for from there and above.
        base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded one.
        revision: Of `base`.
        head: The task's head, which may have a record and a check of its own.
        **kwargs: For `Denoiser.from_pretrained`.

    Raises:
        FileNotFoundError: If the recorded folder is not there.
        OSError: If it cannot be loaded.
        ValueError: If it is another model; see `check_base`.
    """
    if isinstance(base, Denoiser):
        denoiser = base
    elif base is not None and not isinstance(base, (str, os.PathLike)):
        denoiser = Denoiser.from_pipe(base)
    elif base is not None:
        denoiser = Denoiser.from_pretrained(os.fspath(base), revision=revision, **kwargs)
    else:
        denoiser = _recorded(recipe, task, **kwargs)
    if hasattr(head, "check_base"):
        head.check_base(denoiser)
    check_base(denoiser, recipe)
    return denoiser


def _recorded(recipe: FeatureRecipe | ZeroShotRecipe, task: Path, **kwargs: Any) -> Denoiser:
    base, noun = recipe.base, recipe.NOUN
    if base.name is None:
        raise ValueError(
            f"The {noun} was fitted on a {base.model_class} that has no name (it was built from parts). Pass the "
            "model: base=<folder, Hub id, pipeline or Denoiser>."
        )
    if not base.local:
        try:
            return Denoiser.from_pretrained(base.name, revision=base.commit or base.revision, **kwargs)
        except OSError as error:
            raise HubError(
                f"The {noun} needs its base model {base.name!r} (revision {base.commit or base.revision or 'main'}), "
                f"which could not be loaded: {error}\nPass base=<folder, Hub id, pipeline or Denoiser> to use a copy."
            ) from error
    remedy = f"Pass base=<folder, Hub id, pipeline or Denoiser> with the same {base.model_class}."
    folder = recorded_folder(base.name, task, "model_index.json", f"The {noun}'s base model", remedy)
    return Denoiser.from_pretrained(folder, **kwargs)


def recorded_folder(name: str, task: Path, file: str, what: str, remedy: str) -> Path:
    """A folder that a recipe names: as it is, or, of a relative one, from the task's folder or one above it.

    Args:
        name: The folder.
        task: Folder of the task.
        file: That it holds.
        what: It is, for the message.
        remedy: What to try.

    Raises:
        FileNotFoundError: If it is not there.
    """
    folder = Path(name).expanduser()
    roots = [] if folder.is_absolute() else [task.resolve(), *task.resolve().parents]
    for candidate in (folder, *(root / folder for root in roots)):
        if (candidate / file).is_file():
            return candidate
    above = "" if folder.is_absolute() else f", nor in {str(task)!r} and the folders above it"
    raise FileNotFoundError(f"{what} was the folder {name!r}, which is not here{above}. {remedy}")


def check_base(denoiser: Denoiser, recipe: FeatureRecipe | ZeroShotRecipe) -> None:
    """Refuse a base on which the head's weights mean nothing; warn of one that may be another.

    Raises:
        ValueError: If its class, its layers, their channels, or its noise schedule differ; says what came and what
            was recorded.
    """
    was, came, dependent = recipe.base, base_record(denoiser, marks=recipe.base.marks), _dependent(recipe)
    bases.refuse_other_class(dependent, was, came)
    if not isinstance(recipe, FeatureRecipe):
        _check_whole_network(denoiser, recipe, was, came, dependent)
        return
    if recipe.foreign is None:
        _check_features_there(denoiser, recipe, was, came, dependent)
    name, old = called(came), called(was, "a model without a name")
    differing = bases.config_differences(was, came, config_defaults(denoiser))
    if differing:
        if recipe.foreign is None:
            _measure(denoiser, recipe, "; ".join(differing))
        _warn(f"{name} has another config than the {recipe.NOUN}'s base ({old}): {'; '.join(differing)}.", recipe)
    if not bases.same_marks(was, came):
        _warn(f"{name} has other weights than the {recipe.NOUN}'s base ({old}).", recipe)


def _check_whole_network(
    denoiser: Denoiser, recipe: ZeroShotRecipe, was: BaseRecord, came: BaseRecord, dependent: Dependent
) -> None:
    """A task that asks the network itself: the same config and the same noise process; other weights are warned of."""
    bases.refuse_other_config(dependent, was, came, config_defaults(denoiser))
    found = [denoiser.level(level.timestep) for level in recipe.levels]
    levels = [Level({}, float(level.timestep), float(level.nsr)) for level in found]
    bases.refuse_other_levels(dependent, was, came, recipe.levels, levels)
    recipe.classes.check(denoiser)
    if not bases.same_marks(was, came):
        old = called(was, "a model without a name")
        text = f"{called(came)} has other weights than the {recipe.NOUN}'s base ({old}). Evaluate it again."
        warnings.warn(text, stacklevel=5)


def _check_features_there(
    denoiser: Denoiser, recipe: FeatureRecipe, was: BaseRecord, came: BaseRecord, dependent: Dependent
) -> None:
    bases.refuse_missing_layers(
        dependent, was, came, dict(plain_module(denoiser.model).named_modules(remove_duplicate=False))
    )
    found = [Level({}, float(level.timestep), float(level.nsr)) for level in recipe.extractor(denoiser).levels]
    bases.refuse_other_levels(dependent, was, came, recipe.levels, found)


def _warn(what: str, recipe: FeatureRecipe) -> None:
    warnings.warn(f"{what} Features may differ; evaluate the {recipe.NOUN} again before you rely on it.", stacklevel=5)


def _measure(denoiser: Denoiser, recipe: FeatureRecipe, differing: str) -> None:
    """Measure the features of one grey image: other configs may give features of other sizes."""
    size = denoiser.resize_to() if recipe.image_size == "keep" else recipe.image_size
    grey = torch.full((1, denoiser.image_channels, *(size or _GREY)), 0.5)
    try:
        output = recipe.extractor(denoiser)(grey, prompt=recipe.prompt, class_labels=recipe.class_labels)
    except (ValueError, RuntimeError, TypeError) as error:
        has = f"does not take what the {recipe.NOUN} gives it ({error}): its config differs ({differing})"
        on = f"a {recipe.base.model_class}"
        raise _dependent(recipe).refusal(BaseRecord(denoiser.name), has, on, recipe.base) from error
    check_features(recipe, recipe.sizes(output), denoiser.name)


def check_features(recipe: FeatureRecipe, sizes: Mapping[str, int], name: str | None) -> None:
    """Raise ValueError unless each layer gives as many values as it gave when the head was fitted."""
    bases.refuse_other_sizes(_dependent(recipe), recipe.base, BaseRecord(name), sizes)
