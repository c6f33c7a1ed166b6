"""The model under a probe: recorded when the probe is fitted, found and checked when it is loaded."""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub import HubError, is_repo_id
from diffusers_repr.hub.places import is_place, last_name
from diffusers_repr.tasks.recipe import BaseRecord, ProbeRecipe

_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")
_MARKED, _VALUES = 8, 4  # parameters looked at, and values of each


def record_base(
    denoiser: Denoiser, features: Mapping[str, int], name: str | None = None, revision: str | None = None
) -> BaseRecord:
    """What is written of a base.

    Args:
        denoiser: The base.
        features: Layer -> values of its pooled feature.
        name: Hub id or folder to write instead of the one it was loaded from.
        revision: Goes with `name`.
    """
    model = _plain(denoiser)
    commit = None
    if name is None:
        name, revision = denoiser.name, denoiser.revision
        for path in (str(denoiser.config.get("_name_or_path", "")), name or ""):
            found = _SNAPSHOT.search(path)
            if found:
                name, commit = found[1].replace("--", "/"), found[2]
    local = name is not None and (Path(name).expanduser().is_dir() or not is_repo_id(name))
    return BaseRecord(
        name, local, revision, commit, type(model).__name__, _config(denoiser), dict(features), _marks(model)
    )


def written_base(base: BaseRecord, folder: Path | None) -> BaseRecord:
    """The record as a file holds it: no absolute place of this machine.

    Args:
        base: As it is in memory.
        folder: Of the probe: a base elsewhere on this disk is told as the way from there. None, for what is shared:
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


def found_base(base: BaseRecord, probe: Path) -> BaseRecord:
    """The record as it is in memory: where it tells the way from the probe's folder, the place it leads to."""
    if base.name is None or not base.local or not base.name.startswith("."):
        return base
    place = Path(os.path.normpath(os.path.join(os.path.abspath(probe), base.name)))
    return replace(base, name=str(place)) if place.is_dir() else base


def open_base(
    recipe: ProbeRecipe, probe: Path, base: Any = None, revision: str | None = None, **kwargs: Any
) -> Denoiser:
    """The base of a probe, checked.

    Args:
        recipe: The probe's recipe.
        probe: Its folder; a relative base folder is also looked for from there and above.
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
        denoiser = _recorded(recipe.base, probe, **kwargs)
    check_base(denoiser, recipe)
    return denoiser


def _recorded(base: BaseRecord, probe: Path, **kwargs: Any) -> Denoiser:
    if base.name is None:
        raise ValueError(
            f"The probe was fitted on a {base.model_class} that has no name (it was built from parts). Pass the "
            "model: base=<folder, Hub id, pipeline or Denoiser>."
        )
    if not base.local:
        try:
            return Denoiser.from_pretrained(base.name, revision=base.commit or base.revision, **kwargs)
        except OSError as error:
            raise HubError(
                f"The probe needs its base model {base.name!r} (revision {base.commit or base.revision or 'main'}), "
                f"which could not be loaded: {error}\nPass base=<folder, Hub id, pipeline or Denoiser> to use a copy."
            ) from error
    folder = Path(base.name).expanduser()
    # A relative folder is looked for from here, then from the probe's folder and those above it.
    roots = [] if folder.is_absolute() else [probe.resolve(), *probe.resolve().parents]
    for candidate in (folder, *(root / folder for root in roots)):
        if (candidate / "model_index.json").is_file():
            return Denoiser.from_pretrained(candidate, **kwargs)
    above = "" if folder.is_absolute() else f", nor in {str(probe)!r} and the folders above it"
    raise FileNotFoundError(
        f"The probe's base model was the folder {base.name!r}, which is not here{above}. Pass base=<folder, Hub id, "
        f"pipeline or Denoiser> with the same {base.model_class}."
    )


def check_base(denoiser: Denoiser, recipe: ProbeRecipe) -> None:
    """Refuse a base on which the head's weights mean nothing; warn of one that may be another.

    Raises:
        ValueError: If its class, its layers, their channels, or its noise schedule differ; says what came and what
            was recorded.
    """
    base, model = recipe.base, _plain(denoiser)
    name, was = _called(denoiser.name, "the given model"), _called(base.name, "a model without a name")
    if type(model).__name__ != base.model_class:
        raise ValueError(
            f"Wrong base for this probe: {name} is a {type(model).__name__}; the probe was fitted on a "
            f"{base.model_class} ({was}). Pass the model it was fitted on as base=..., or fit a new probe."
        )
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [layer for layer in recipe.layers if layer not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.4)
        raise ValueError(
            f"Wrong base for this probe: {name} has no layer {', '.join(map(repr, missing))} (closest: {near}); the "
            f"probe reads {', '.join(recipe.layers)} of {was}. Pass that model as base=..., or fit a new "
            "probe."
        )
    _check_levels(denoiser, recipe, name)
    differing = _differing(base.config, _config(denoiser))
    if differing:
        _check_channels(denoiser, recipe, name, differing)
        _warn(f"{name} has another config than the probe's base ({was}): {'; '.join(differing)}.")
    if not _same_weights(base.marks, model):
        _warn(f"{name} has other weights than the probe's base ({was}).")


def _warn(what: str) -> None:
    warnings.warn(f"{what} Features may differ; evaluate the probe again before you rely on it.", stacklevel=5)


def _check_levels(denoiser: Denoiser, recipe: ProbeRecipe, name: str) -> None:
    for level, found in zip(recipe.levels, recipe.extractor(denoiser).levels, strict=True):
        same = (level.nsr, level.timestep) == (float(found.nsr), float(found.timestep))
        close = abs(float(found.nsr) - level.nsr) <= 1e-3 * abs(level.nsr) + 1e-9
        if not same and not (close and abs(float(found.timestep) - level.timestep) <= 1e-2 * max(level.timestep, 1)):
            raise ValueError(
                f"Wrong base for this probe: {_shown(level.requested)} is timestep {float(found.timestep):g} (nsr "
                f"{float(found.nsr):.4g}) for {name}, and was timestep {level.timestep:g} (nsr {level.nsr:.4g}) "
                "when the probe was fitted: the noise schedules differ. Give the base its own scheduler, or fit a new "
                "probe."
            )


def _check_channels(denoiser: Denoiser, recipe: ProbeRecipe, name: str, differing: list[str]) -> None:
    """Measure the features of one grey image: other configs may give features of other sizes."""
    grey = torch.full((1, denoiser.image_channels, *recipe.image_size), 0.5)
    try:
        output = recipe.extractor(denoiser)(grey, prompt=recipe.prompt, class_labels=recipe.class_labels)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"Wrong base for this probe: {name} does not take what the probe gives it ({error}). Its config differs "
            f"from that of {_called(recipe.base.name, 'the recorded base')}: {'; '.join(differing)}. Pass the model "
            "it was fitted on as base=..., or fit a new probe."
        ) from error
    check_features(recipe, {layer: feature.shape[-1] for layer, feature in output.features.items()}, denoiser.name)


def check_features(recipe: ProbeRecipe, sizes: Mapping[str, int], name: str | None) -> None:
    """Raise ValueError unless each layer gives as many values as it gave when the probe was fitted."""
    for layer, size in recipe.base.features.items():
        if sizes[layer] != size:
            came, was = _called(name, "the given model"), _called(recipe.base.name, "a model without a name")
            raise ValueError(
                f"Wrong base for this probe: layer {layer!r} of {came} gives {sizes[layer]} values with pooling "
                f"{recipe.pooling!r}; the probe was fitted on {size} ({was}). Pass the model it was fitted on as "
                "base=..., or fit a new probe."
            )


def _shown(requested: Mapping[str, float]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in requested.items())


def _called(name: str | None, otherwise: str) -> str:
    return otherwise if name is None else repr(name)


def _plain(denoiser: Denoiser) -> nn.Module:
    return getattr(denoiser.model, "_orig_mod", denoiser.model)


def _config(denoiser: Denoiser) -> dict[str, Any]:
    """The network's config as JSON gives it back, without private keys."""
    public = {k: v for k, v in denoiser.config.items() if not k.startswith("_") and k != "quantization_config"}
    return json.loads(json.dumps(public, default=str, sort_keys=True))


def _differing(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    keys = [k for k in sorted({*recorded, *found}) if recorded.get(k) != found.get(k)]
    return [f"{k} is {found.get(k)!r}, was {recorded.get(k)!r}" for k in keys]


def _marks(model: nn.Module) -> dict[str, list[float]]:
    """The first values of a few weights, evenly spread over the network."""
    usable = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point() and not p.is_meta]
    step = max(len(usable) // _MARKED, 1)
    chosen = usable[::step][:_MARKED]
    return {name: [round(float(v), 8) for v in p.detach().flatten()[:_VALUES]] for name, p in chosen}


def _same_weights(recorded: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether the marked values are those recorded, to the precision of bfloat16; True where they cannot be read."""
    parameters = dict(model.named_parameters())
    for name, values in recorded.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.is_meta or not parameter.is_floating_point():
            continue
        expected = torch.tensor(list(values))
        found = parameter.detach().flatten()[: len(expected)].float().cpu()
        if found.shape != expected.shape or float((found - expected).abs().max()) > 0.02 * float(expected.abs().max()):
            return False
    return True
