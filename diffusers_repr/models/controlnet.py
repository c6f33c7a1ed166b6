"""A saved ControlNet, ours or another's: the network, and what it is shown masks by."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from diffusers_repr.hub import load_json_config, resolve_folder
from diffusers_repr.hub.components import check_config
from diffusers_repr.models.hint_encoder import HintEncoder
from diffusers_repr.models.weights import check_saved

HINTS = "hint_encoder"  # folder of the encoder in that of the ControlNet
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", f"{HINTS}/*")


def read_controlnet(
    id_or_folder: str | os.PathLike[str], revision: str | None = None
) -> tuple[ControlNetModel, HintEncoder | None]:
    """A ControlNet of diffusers; with what it is shown masks by, where `examples/train_controlnet.py` saved it.

    Args:
        id_or_folder: Local folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If it is no ControlNet, or its files are damaged.
        OSError: If there is no such folder or repository, or a file cannot be read.
    """
    name = os.fspath(id_or_folder)
    config = check_config(load_json_config(name, "config.json", revision), f"config.json of {name!r}")
    if config.get("_class_name") != ControlNetModel.__name__:
        found = config.get("_class_name") or config.get("model_type")
        raise ValueError(f"{name!r} holds a {found!r}, no {ControlNetModel.__name__}.")
    folder = resolve_folder(name, revision, allow_patterns=_FILES)
    check_saved(ControlNetModel, folder)
    loaded: Any = ControlNetModel
    controlnet = loaded.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    hints = HintEncoder.from_pretrained(folder / HINTS) if (folder / HINTS).is_dir() else None
    return controlnet, hints


def load_controlnet(
    id_or_folder: str | os.PathLike[str], revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[ControlNetModel, HintEncoder]:
    """What `examples/train_controlnet.py` saved: the ControlNet, and what it is shown masks by.

    Args:
        id_or_folder: Local folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the ControlNet's weights.

    Raises:
        ValueError: As `read_controlnet`, and if it has no encoder of hints.
        OSError: As `read_controlnet`.
    """
    controlnet, hints = read_controlnet(id_or_folder, revision)
    if hints is None:
        raise ValueError(
            f"{os.fspath(id_or_folder)!r} has no {HINTS}/, which tells how masks become hints; train it by "
            "train_controlnet.py, which goes on from it by --controlnet_name_or_path."
        )
    return nn.Module.to(controlnet, dtype), hints


__all__ = ["HINTS", "load_controlnet", "read_controlnet"]
