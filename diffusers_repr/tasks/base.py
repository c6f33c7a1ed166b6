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
from diffusers_repr.tasks.recipe import TaskRecipe
from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe

_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


def _dependent(recipe: TaskRecipe | ZeroShotRecipe) -> Dependent:
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
    found, commit = base_record(denoiser), None
    if name is None:
        name, revision = found.name, found.revision
        for path in (str(denoiser.config.get("_name_or_path", "")), name or ""):
            snapshot = _SNAPSHOT.search(path)
            if snapshot:
                name, commit = snapshot[1].replace("--", "/"), snapshot[2]
    local = name is not None and (Path(name).expanduser().is_dir() or not is_repo_id(name))
    return BaseRecord(
        name, local, revision, commit, found.model_class, found.config, features=dict(features), marks=found.marks
    )


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
    recipe: TaskRecipe | ZeroShotRecipe, task: Path, base: Any = None, revision: str | None = None, **kwargs: Any
) -> Denoiser:
    """The base of a task, checked.

    Args:
        recipe: The task's recipe.
        task: Its folder; a relative base folder is also looked for from there and above.
        base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded one.
        revision: Of `base`.
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
    check_base(denoiser, recipe)
    return denoiser


def _recorded(recipe: TaskRecipe | ZeroShotRecipe, task: Path, **kwargs: Any) -> Denoiser:
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
    folder = Path(base.name).expanduser()
    # A relative folder is looked for from here, then from the task's folder and those above it.
    roots = [] if folder.is_absolute() else [task.resolve(), *task.resolve().parents]
    for candidate in (folder, *(root / folder for root in roots)):
        if (candidate / "model_index.json").is_file():
            return Denoiser.from_pretrained(candidate, **kwargs)
    above = "" if folder.is_absolute() else f", nor in {str(task)!r} and the folders above it"
    raise FileNotFoundError(
        f"The {noun}'s base model was the folder {base.name!r}, which is not here{above}. Pass base=<folder, Hub id, "
        f"pipeline or Denoiser> with the same {base.model_class}."
    )


def check_base(denoiser: Denoiser, recipe: TaskRecipe | ZeroShotRecipe) -> None:
    """Refuse a base on which the head's weights mean nothing; warn of one that may be another.

    Raises:
        ValueError: If its class, its layers, their channels, or its noise schedule differ; says what came and what
            was recorded.
    """
    was, came, dependent = recipe.base, base_record(denoiser, marks=recipe.base.marks), _dependent(recipe)
    bases.refuse_other_class(dependent, was, came)
    if not isinstance(recipe, TaskRecipe):
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
    denoiser: Denoiser, recipe: TaskRecipe, was: BaseRecord, came: BaseRecord, dependent: Dependent
) -> None:
    bases.refuse_missing_layers(
        dependent, was, came, dict(plain_module(denoiser.model).named_modules(remove_duplicate=False))
    )
    found = [Level({}, float(level.timestep), float(level.nsr)) for level in recipe.extractor(denoiser).levels]
    bases.refuse_other_levels(dependent, was, came, recipe.levels, found)


def _warn(what: str, recipe: TaskRecipe) -> None:
    warnings.warn(f"{what} Features may differ; evaluate the {recipe.NOUN} again before you rely on it.", stacklevel=5)


def _measure(denoiser: Denoiser, recipe: TaskRecipe, differing: str) -> None:
    """Measure the features of one grey image: other configs may give features of other sizes."""
    grey = torch.full((1, denoiser.image_channels, *recipe.image_size), 0.5)
    try:
        output = recipe.extractor(denoiser)(grey, prompt=recipe.prompt, class_labels=recipe.class_labels)
    except (ValueError, RuntimeError, TypeError) as error:
        has = f"does not take what the {recipe.NOUN} gives it ({error}): its config differs ({differing})"
        on = f"a {recipe.base.model_class}"
        raise _dependent(recipe).refusal(BaseRecord(denoiser.name), has, on, recipe.base) from error
    check_features(recipe, recipe.sizes(output), denoiser.name)


def check_features(recipe: TaskRecipe, sizes: Mapping[str, int], name: str | None) -> None:
    """Raise ValueError unless each layer gives as many values as it gave when the head was fitted."""
    bases.refuse_other_sizes(_dependent(recipe), recipe.base, BaseRecord(name), sizes)
