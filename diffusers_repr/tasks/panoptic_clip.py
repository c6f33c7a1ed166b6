"""The CLIP of an open-vocabulary segmenter: recorded when its head is trained, found and checked when it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.hub import HubError
from diffusers_repr.hub.base_record import BaseRecord, Dependent, config_differences, same_marks
from diffusers_repr.hub.identity import weight_marks
from diffusers_repr.tasks.base import named_place, recorded_folder

_NOUN = "open-vocabulary segmenter"
_DEPENDENT = Dependent(_NOUN, "head", "trained", "Pass the CLIP it was trained with: clip=<folder or Hub id>.")
_SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "patch_size")


def record_clip(towers: ImageTextEncoder, name: str | None = None, marks: dict[str, Any] | None = None) -> BaseRecord:
    """What is written of a CLIP: where it is, the shapes of its towers, its statistics, and marks of its weights.

    Args:
        towers: The CLIP.
        name: Hub id or folder to write instead of the one it was loaded from.
        marks: Those of another record, to read the same values.
    """
    place = named_place(name) if name is not None else named_place(towers.name, towers.revision, "")
    config = towers.model.config
    shapes = {
        f"{part}.{key}": getattr(tower, key)
        for part, tower in (("text", config.text_config), ("vision", config.vision_config))
        for key in _SHAPES
        if hasattr(tower, key)
    }
    own = {"projection_dim": towers.dim, **shapes, "mean": list(towers.mean), "std": list(towers.std)}
    plain = json.loads(json.dumps(own))
    return BaseRecord(
        **place, model_class=type(towers.model).__name__, config=plain, marks=weight_marks(towers.model, marks)
    )


def open_clip(was: BaseRecord, task: Path, clip: Any = None, token: str | None = None) -> ImageTextEncoder:
    """The CLIP of a task, checked.

    Args:
        was: As the recipe tells it.
        task: Folder of the task.
        clip: An `ImageTextEncoder`, folder or Hub id to take instead of the recorded one.
        token: Hub token.

    Raises:
        FileNotFoundError: If the recorded folder is not there.
        HubError: If the Hub does not give it.
        ValueError: If it is another CLIP.
    """
    if isinstance(clip, ImageTextEncoder):
        towers = clip
    elif clip is not None:
        towers = ImageTextEncoder.from_pretrained(os.fspath(clip), token=token)
    else:
        towers = _recorded(was, task, token)
    check_clip(towers, was)
    return towers


def _recorded(was: BaseRecord, task: Path, token: str | None) -> ImageTextEncoder:
    if was.name is None:
        raise ValueError(
            f"The {_NOUN} was trained with a CLIP that has no name (it was built from parts). Pass it: clip=<folder, "
            "Hub id or ImageTextEncoder>."
        )
    remedy = "Pass clip=<folder, Hub id or ImageTextEncoder> with the same CLIP."
    if was.local:
        folder = recorded_folder(was.name, task, "config.json", f"The {_NOUN}'s CLIP", remedy)
        return ImageTextEncoder.from_pretrained(folder)
    try:
        return ImageTextEncoder.from_pretrained(was.name, was.commit or was.revision, token)
    except OSError as error:
        raise HubError(
            f"The {_NOUN} needs the CLIP {was.name!r} (revision {was.commit or was.revision or 'main'}), which could "
            f"not be loaded: {error}\n{remedy}"
        ) from error


def check_clip(towers: ImageTextEncoder, was: BaseRecord) -> None:
    """Refuse another CLIP: its vectors of texts and images mean something else.

    Raises:
        ValueError: If shapes, statistics or weights differ.
    """
    came = record_clip(towers, marks=dict(was.marks))
    differing = config_differences(was, came, {})
    if differing:
        raise _DEPENDENT.refusal(came, f"is another CLIP ({'; '.join(differing)})", "another", was)
    if not same_marks(was, came):
        raise _DEPENDENT.refusal(came, "is a CLIP of other weights", "others", was)


__all__ = ["check_clip", "open_clip", "record_clip"]
