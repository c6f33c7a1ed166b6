"""What may stand in a task's recipe: every field with its bounds, checked before anything is made of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from diffusers_repr.capture.capture import Where
from diffusers_repr.features.noise_policy import Policy
from diffusers_repr.features.pooling import MAPS, POOLINGS, VECTORS
from diffusers_repr.hub.components import MAX_SIDE, MAX_WIDTH
from diffusers_repr.hub.errors import is_repo_id
from diffusers_repr.hub.schema import (
    Check,
    anything,
    boolean,
    either,
    integer,
    listing,
    mapping,
    number,
    one_of,
    optional,
    record,
    shown,
    text,
)

MAX_ENSEMBLE, MAX_LEVELS, MAX_LAYERS = 4096, 1000, 1000
_MAX_PIXELS = 1 << 24
_MAX_ROWS = 1 << 53

_SIZE = integer(1, MAX_SIDE)
# JSON has no infinity; a level of pure noise is written as text.
_LEVEL = either(one_of("inf", "-inf"), number())
_CLASS = text(200, pattern=r"[A-Za-z_]\w*", what="the name of a class")
_NAME = text(1000, pattern=r"(?!\\\\|//)[^\x00-\x1f\x7f]+", what="a folder or a Hub id")


# What recipes have beside what all have: those of fitted tasks, and of single ones.
FITTED: dict[str, Check] = {
    "label_names": listing(text(1000), 1, distinct=True),
    "protocol": lambda value, at: _protocol(value, at),
    "train": lambda value, at: _train(value, at),
}
POOLING: dict[str, Check] = {"pooling": text(20, pattern=f"{VECTORS}|{MAPS}", what=f"{POOLINGS}, or 'map:P'")}
MATCHER: dict[str, Check] = {
    "image_size": either(one_of("keep"), listing(_SIZE, 2, 2)),
    "chosen_on": optional(record({"dataset": text(1000), "pairs": integer(0, _MAX_ROWS)})),
}
SEGMENTATION: dict[str, Check] = {"ignore_index": optional(integer(-(1 << 31), (1 << 31) - 1))}


def recipe_schema(score: type, own: Mapping[str, Check], later: Collection[str] = ()) -> Check:
    """The check of a task's recipe, its `format` left out.

    Args:
        score: The dataclass of a score; its fields with defaults may be missing.
        own: Checks of the fields that this task's recipe has beside those of all, or in place of them.
        later: Those of them that files of earlier versions lack.
    """
    measured = record(
        {
            "name": text(200),
            "value": number(),
            "dataset": text(1000),
            "split": text(200),
            "rows": integer(0, _MAX_ROWS),
        },
        {f.name: anything(4, 1000) for f in dataclasses.fields(score) if f.default is not dataclasses.MISSING},
    )
    fields: dict[str, Check] = {
        "base": base_check,
        "layers": listing(text(500), 1, MAX_LAYERS, distinct=True),
        "levels": listing(level_check, 1, MAX_LEVELS),
        "where": one_of(*get_args(Where)),
        "noise": one_of(*get_args(Policy)),
        "seed": integer(-(1 << 63), (1 << 64) - 1),
        "ensemble_size": integer(1, MAX_ENSEMBLE),
        "image_size": listing(_SIZE, 2, 2),
        "preprocessing": mapping(anything(4, 1000), 0, 100),
        "sample_posterior": either(boolean(), one_of("per_member")),
        "prompt": optional(text()),
        "class_labels": optional(integer(0, MAX_WIDTH)),
        "scores": listing(measured, 0, 10_000),
        "versions": mapping(text(200), 0, 100),
        **own,
    }
    extra = {"source": optional(_CLASS), **{name: fields.pop(name) for name in later}}
    check = record(fields, extra)

    def recipe(value: Any, at: str) -> dict[str, Any]:
        checked = check(value, at)
        if checked["image_size"] != "keep" and math.prod(checked["image_size"]) > _MAX_PIXELS:
            sides = " x ".join(map(str, checked["image_size"]))
            raise ValueError(f"{at}: image_size is {sides}; allowed are {_MAX_PIXELS} pixels in all.")
        if set(checked["base"]["features"]) != set(checked["layers"]):
            raise ValueError(f"{at}: base.features names other layers than layers; it must have each of them.")
        return checked

    return recipe


def level_check(value: Any, at: str) -> dict[str, Any]:
    """The check of a noise level: what was asked for, by one name, and what it came to."""
    requests = {name: _LEVEL for name in ("timestep", "nsr", "half_log_snr")}
    level = record({"requested": record({}, requests), "timestep": number(), "nsr": _LEVEL})(value, at)
    if len(level["requested"]) != 1:
        raise ValueError(f"{at}.requested has {len(level['requested'])} fields; exactly one of {', '.join(requests)}.")
    nsr = float(level["nsr"])
    if nsr < 0:
        raise ValueError(f"{at}.nsr is {nsr}; allowed is a number from 0.")
    asked = {name: float(asked) for name, asked in level["requested"].items()}
    return {"requested": asked, "timestep": level["timestep"], "nsr": nsr}


# What a task keeps of its base.
BASE: dict[str, Check] = {
    "name": optional(_NAME),
    "local": boolean(),
    "revision": optional(text(200, pattern=r"[^\x00-\x20\x7f]+", what="a branch, tag or commit")),
    "commit": optional(text(40, pattern="[0-9a-f]{40}", what="a commit of 40 hexadecimal digits")),
    "model_class": _CLASS,
    "config": mapping(anything(12, 300_000), 0, 1000),
    "features": mapping(integer(1, MAX_WIDTH), 0, MAX_LAYERS),
    "marks": mapping(listing(number(), 1, 64), 0, 1000),
}
_BASE = record(BASE)


def base_check(value: Any, at: str) -> dict[str, Any]:
    """The check of a base's record: `BASE`, and a name that is a Hub id where it is no folder."""
    base = _BASE(value, at)
    if base["name"] is not None and not base["local"] and not is_repo_id(base["name"]):
        raise ValueError(f"{at}.name is {shown(base['name'])}; with local false, allowed is a Hub id ('user/name').")
    return base


_PROTOCOL = record(
    {"name": text(200), "version": integer(0)},
    {
        "source": text(2000),
        "changed": listing(text(200), 0, 100),
        "chosen": mapping(either(boolean(), number()), 0, 100),
    },
    others=True,
)


def _protocol(value: Any, at: str) -> dict[str, Any]:
    _PROTOCOL(value, at)
    return mapping(anything(4, 10_000), 0, 100)(value, at)


_TRAIN = record({"dataset": text(1000), "split": text(200), "rows": integer(0, _MAX_ROWS)}, others=True)


def _train(value: Any, at: str) -> Mapping[str, Any]:
    _TRAIN(value, at)
    return mapping(anything(4, 10_000), 0, 100)(value, at)


__all__ = [
    "BASE",
    "FITTED",
    "MATCHER",
    "MAX_ENSEMBLE",
    "MAX_LAYERS",
    "MAX_LEVELS",
    "POOLING",
    "SEGMENTATION",
    "base_check",
    "level_check",
    "recipe_schema",
]
