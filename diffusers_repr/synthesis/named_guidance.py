"""Guidance by its name, as a recipe gives it: a scale, or settings, some of which name folders and pictures.

    guidance:
      PAG: 3.0
      AutoGuidance: {weaker_model: outputs/younger, scale: 1.1, interval: [100, 900]}

A name is looked up in one table; nothing that a recipe says is run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance import (
    CFG,
    PAG,
    SAG,
    AutoGuidance,
    ClassifierGuidance,
    DepthGuidance,
    Guidance,
    ReadoutGuidance,
    SummedReadoutGuidance,
)
from diffusers_repr.heads import MapHead, list_heads
from diffusers_repr.hub import load_json_config
from diffusers_repr.hub.components import check_config
from diffusers_repr.hub.identity import plain_hash, tensor_hash, weights_hash
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.store.image_store import ImageKey

# Of every guidance.
_STEP = ("scale", "interval", "adaptive")
# How much of the settings a key tells; of longer ones it tells a hash.
_TOLD = 400


@dataclasses.dataclass(frozen=True)
class Named:
    """How a recipe names a guidance.

    Attributes:
        kind: Class of its settings.
        plain: Settings that are taken as they stand, beside scale, interval and adaptive.
        parts: Setting -> what opens the folder, the picture or the list that stands there.
        needed: Parts without which there is nothing to guide by.
    """

    kind: type[Guidance]
    plain: tuple[str, ...] = ()
    parts: Mapping[str, Callable[[str, Any, Denoiser, Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    needed: tuple[str, ...] = ()


def check_named(given: Mapping[str, Any]) -> None:
    """Refuse names and settings that no guidance has, before anything is opened.

    Args:
        given: Name -> scale, or settings.

    Raises:
        ValueError: Naming what is allowed.
    """
    for name, value in given.items():
        named, settings = _named(name), _settings(name, value)
        allowed = (*_STEP, *named.plain, *named.parts)
        for key in settings:
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"`guidance: {name}` has no setting {key!r}; it has {', '.join(allowed)}.{hint}")
        missing = [key for key in named.needed if settings.get(key) is None]
        if missing:
            raise ValueError(
                f"`guidance: {name}` needs more than a scale; name {' and '.join(missing)}, as in "
                f"{name}: {{scale: 1.0, {missing[0]}: ...}}."
            )
        if not named.parts:
            _made(name, named.kind, settings)


def open_named(given: Mapping[str, Any], denoiser: Denoiser) -> list[Guidance]:
    """The guidances of a recipe, in its order, with what they name opened.

    Args:
        given: See `check_named`.
        denoiser: What is guided; networks come to its device, those that are run beside it in its dtype.

    Raises:
        ValueError: As `check_named`; for a folder that holds something else, and as the guidance itself.
        OSError: If there is no such folder, repository or file.
    """
    check_named(given)
    return [_opened(name, _settings(name, value), denoiser) for name, value in given.items()]


def for_keys(guidance: Sequence[Guidance], keys: Sequence[ImageKey]) -> list[Guidance]:
    """Guidances for the images of some keys: towards a class that nobody names means towards that of each image.

    Raises:
        ValueError: For `ClassifierGuidance` without `class_labels` of images whose condition is no class id.
    """
    return [
        dataclasses.replace(one, class_labels=_classes(keys))
        if isinstance(one, ClassifierGuidance) and one.class_labels is None
        else one
        for one in guidance
    ]


def described(guidance: Sequence[Guidance]) -> dict[str, Any]:
    """What decides an image by its guidance, as JSON: the settings, and hashes of networks, maps and functions."""
    told: dict[str, Any] = {"guidance": [repr(one) for one in guidance]}
    if sum(map(len, told["guidance"])) > _TOLD:
        told["guidance"] = [f"{type(one).__name__} {plain_hash(repr(one))}" for one in guidance]
    marks = [_mark(one) for one in guidance]
    return told | ({"guided_by": plain_hash(marks)} if any(marks) else {})


# One guidance


def _named(name: Any) -> Named:
    if name in FROM_PYTHON:
        raise ValueError(f"`guidance: {name}` cannot be named: {FROM_PYTHON[name]}.")
    if name not in GUIDANCES:
        raise ValueError(f"`guidance` has {name!r}; it takes {', '.join(GUIDANCES)}.")
    return GUIDANCES[name]


def _settings(name: str, value: Any) -> dict[str, Any]:
    """A scale as settings."""
    if isinstance(value, Mapping):
        settings = dict(value)
        value = settings.get("scale", 0.0)
        if settings.get("interval") is not None:
            settings["interval"] = _interval(name, settings["interval"])
    else:
        settings = {"scale": value}
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`guidance: {name}` is a scale, or a mapping of settings with one; got {value!r}.")
    return settings | ({"scale": float(value)} if "scale" in settings else {})


def _interval(name: str, value: Any) -> tuple[float, float]:
    numbers = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not numbers or not all(isinstance(end, Real) and not isinstance(end, bool) for end in value):
        raise ValueError(f"`interval` of {name} is [low, high], two training timesteps; got {value!r}.")
    return (value[0], value[1])


def _opened(name: str, settings: dict[str, Any], denoiser: Denoiser) -> Guidance:
    named = _named(name)
    opened = {
        key: named.parts[key](f"{key} of {name}", value, denoiser, settings) if key in named.parts else value
        for key, value in settings.items()
        if value is not None
    }
    return _made(name, named.kind, opened)


def _made(name: str, kind: type[Guidance], settings: Mapping[str, Any]) -> Guidance:
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`guidance: {name}`: {error}") from error


def _classes(keys: Sequence[ImageKey]) -> list[int]:
    for key in keys:
        if key.condition is None or not (key.condition.isascii() and key.condition.isdigit()):
            raise ValueError(
                f"ClassifierGuidance guides each image towards its class id, and this one has {key.condition!r}; name "
                "`class_labels` of ClassifierGuidance, one class for all."
            )
    return [int(str(key.condition)) for key in keys]


# What a setting names


def _network(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> Denoiser:
    """A pipeline: a weaker one, or a prior."""
    found = Denoiser.from_pretrained(_text(at, value), dtype=denoiser.dtype)
    nn.Module.to(found.model, denoiser.device)
    return found


def _prior(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> Denoiser:
    """In float32, in which its energy is taken."""
    found = Denoiser.from_pretrained(_text(at, value))
    nn.Module.to(found.model, denoiser.device)
    return found


def _classifier(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> nn.Module:
    return _model(at, _text(at, value), {"NoisyClassifier": NoisyClassifier}).to(denoiser.device)


def _head(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> Any:
    classes = {cls.__name__: cls for cls in list_heads(MapHead).values()}
    return _model(at, _text(at, value), classes).to(denoiser.device)


def _model(at: str, place: str, classes: Mapping[str, Any]) -> Any:
    told = check_config(load_json_config(place, "config.json"), f"config.json of {place!r}")
    kind = told.get("_class_name")
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"`{at}`: {place!r} holds a {kind!r}; a {' or '.join(classes)} is needed.")
    return classes[kind].from_pretrained(place).eval()


def _target(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> Tensor:
    """A picture, black the lowest label of the head and white the highest: `(C, H, W)`."""
    place = str(settings["head"])
    told = load_json_config(place, "config.json")
    low, high = (float(end) for end in told.get("label_range", (-1.0, 1.0)))
    image = _picture(at, value).convert("RGB" if told.get("out_channels", 1) == 3 else "L")
    shares = torch.from_numpy(np.array(image)).float() / 255
    return low + (high - low) * (shares.permute(2, 0, 1) if shares.ndim == 3 else shares[None])


def _reference(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> Tensor:
    """A picture as x_0 `(C, h, w)`."""
    with torch.no_grad():
        return denoiser.encode([_picture(at, value)])[0]


def _parts(at: str, value: Any, denoiser: Denoiser, settings: Mapping[str, Any]) -> list[Guidance]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"`{at}` is a list of settings of ReadoutGuidance; got {value!r}.")
    for part in value:
        if not isinstance(part, Mapping):
            raise ValueError(f"`{at}` is a list of settings of ReadoutGuidance; got {part!r} in it.")
        check_named({"ReadoutGuidance": part})
    return [_opened("ReadoutGuidance", dict(part), denoiser) for part in value]


def _picture(at: str, value: Any) -> Image.Image:
    try:
        with Image.open(_text(at, value)) as image:
            return image.copy()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{at}`: there is no picture {value!r}.") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"`{at}`: {value!r} is no picture that can be read ({error}).") from error


def _text(at: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{at}` names a folder, a file or a Hub id; got {value!r}.")
    return value


# Neither `reference_row` nor `published`: by them an image would depend on the others of its batch.
_OF_A_READOUT = ("points", "boxes", "pooled", "rescale", "seed", "weight", "update", "steps", "checkpoint")
GUIDANCES = {
    "CFG": Named(CFG, ("rescale",)),
    "PAG": Named(PAG, ("layers", "perturbation")),
    "SAG": Named(SAG, ("layers", "blur_sigma", "kernel_size", "threshold", "clip")),
    "AutoGuidance": Named(AutoGuidance, (), {"weaker_model": _network}, ("weaker_model",)),
    "ClassifierGuidance": Named(ClassifierGuidance, ("class_labels",), {"classifier": _classifier}, ("classifier",)),
    "ReadoutGuidance": Named(
        ReadoutGuidance, _OF_A_READOUT, {"head": _head, "target": _target, "reference": _reference}, ("head",)
    ),
    "SummedReadoutGuidance": Named(
        SummedReadoutGuidance, ("update", "steps", "checkpoint"), {"parts": _parts}, ("parts",)
    ),
    "DepthGuidance": Named(
        DepthGuidance, ("consistency_weight", "prior_weight", "prior_level", "update", "seed", "checkpoint"),
        {"strong": _head, "weak": _head, "prior": _prior}, ("strong",),
    ),
}  # fmt: skip
# Those that need what no file holds.
FROM_PYTHON = {
    "EnergyGuidance": "it follows a function; from Python, ClassMaker(denoiser, guidance=[EnergyGuidance(fn)])",
    "HintGuidance": "it is what `guidance_scale` of `method: hint` is",
}


# Keys


def _mark(value: Any) -> Any:
    """What its `repr` leaves out of a guidance, as plain values; None for nothing."""
    if isinstance(value, Guidance):
        fields = [field for field in dataclasses.fields(value) if field.init]
        found = {field.name: _mark(getattr(value, field.name)) for field in fields}
        marks = {name: mark for name, mark in found.items() if mark}
        return {type(value).__name__: marks} if marks else None
    if isinstance(value, nn.Module):
        return weights_hash(value)
    if isinstance(value, Denoiser):
        return weights_hash(value.model)
    if isinstance(value, Tensor):
        return tensor_hash(value)
    if isinstance(value, list | tuple):
        several = [_mark(one) for one in value]
        return several if any(several) else None
    if hasattr(value, "components"):
        return weights_hash(Denoiser.from_pipe(value).model)
    return f"{value.__module__}.{value.__qualname__}" if callable(value) and hasattr(value, "__qualname__") else None


__all__ = ["FROM_PYTHON", "GUIDANCES", "Named", "check_named", "described", "for_keys", "open_named"]
