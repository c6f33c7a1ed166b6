"""`load_heads`: a run that goes on from a saved model takes over the heads that were trained beside it."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffusers_repr.hub import read_json, resolve_folder
from diffusers_repr.hub.identity import config_hash
from diffusers_repr.objectives.artifacts import ModelArtifact, model_class
from diffusers_repr.objectives.base import Objective

_logger = logging.getLogger(__name__)
_FILES = ("model_index.json", "heads/*/config.json", "heads/*/*.safetensors")
_NUMBERED = re.compile(r"projector-\d+")  # as `diffusers-repr convert` calls them: a checkpoint names no encoder


def load_heads(
    objective: Objective,
    id_or_folder: str | os.PathLike[str],
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, str]:
    """Take over the trained heads of an earlier run: those of the same name, class, shape and encoder.

    The projectors of a converted checkpoint are numbered; they are taken in the order of the encoders, where there are
    as many. Heads that start anew beside saved ones are named in one warning; a base without heads has none to go on.

    Args:
        objective: Of the new run, before it is prepared.
        id_or_folder: What the earlier run saved, or `diffusers-repr convert` wrote.
        revision: Of a Hub id.
        token: Hub token.

    Returns:
        Why, of each head that starts anew.

    Raises:
        ValueError: For a head that cannot be read, or holds weights that are not finite.
        HubError: If the Hub cannot be read.
    """
    heads = _heads(objective)
    if not heads:
        return {}
    folder = resolve_folder(id_or_folder, revision, token, allow_patterns=_FILES) / "heads"
    there = {path.parent.name for path in folder.glob("*/config.json")}
    sources = {name: name for name in heads} | _numbered(heads, there)
    fresh: dict[str, str] = {}
    for name, head in heads.items():
        problem: str | None = "none was saved"
        if sources[name] in there:
            problem = _difference(folder / sources[name], head.module, head.config)
        if problem:
            fresh[name] = problem
            continue
        _load(folder / sources[name], head.module)
        _logger.info("%s goes on from %s.", name, folder / sources[name])
    if fresh and there:
        reasons = "; ".join(f"{name}: {why}" for name, why in fresh.items())
        warnings.warn(f"{str(id_or_folder)!r} goes on with heads that start anew ({reasons}).", stacklevel=2)
    return fresh


def encoder_mark(encoder: Any) -> str:
    """A hash of what decides an encoder's features, its name aside."""
    return config_hash({k: v for k, v in encoder.fingerprint().items() if k not in ("name", "revision")})


def _heads(objective: Objective) -> dict[str, ModelArtifact]:
    """What lies in `heads/` of a result, by name."""
    found = [part for part in objective.artifacts() if isinstance(part, ModelArtifact)]
    return {part.name: part for part in found if part.folder.startswith("heads/")}


def _numbered(heads: Mapping[str, ModelArtifact], there: set[str]) -> dict[str, str]:
    """The numbered head of each projector of an encoder; none unless all heads there are numbered."""
    names = [name for name, head in heads.items() if "encoder" in head.config]
    wanted = [f"projector-{at}" for at in range(len(names))]
    if set(wanted) != there or not all(_NUMBERED.fullmatch(name) for name in there):
        return {}
    return dict(zip(names, wanted, strict=True))


def _difference(folder: Path, module: nn.Module, marks: Mapping[str, Any]) -> str | None:
    """Why a saved head is not this one; None if it is."""
    saved, cls = read_json(folder / "config.json"), model_class(module)
    if not isinstance(saved, dict) or saved.get("_class_name") != cls.__name__:
        return f"the saved one is no {cls.__name__}"
    own: Any = getattr(module, "config")  # noqa: B009  of a diffusers model
    for key, value in json.loads(json.dumps({k: v for k, v in own.items() if not k.startswith("_")})).items():
        if key not in marks and saved.get(key) != value:
            return f"the saved one has {key}={saved.get(key)!r}, this run {value!r}"
    for key, value in marks.items():
        if saved.get(key) not in (None, value):
            return f"the saved one was trained with another {key} of this name"
    return None


def _load(folder: Path, module: nn.Module) -> None:
    cls: Any = model_class(module)
    try:
        state = cls.from_pretrained(folder, use_safetensors=True).state_dict()
    except (OSError, RuntimeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"The head {str(folder)!r} cannot be read: {str(error).rstrip('.')}. Repair or delete it; without it the "
            "head starts anew."
        ) from error
    module.load_state_dict(state)


__all__ = ["encoder_mark", "load_heads"]
