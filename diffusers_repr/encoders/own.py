"""Encoders that are networks of this package: by the class that their config names, in an open table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.encoders.source import Source, pair
from diffusers_repr.hub.components import check_config, check_weight_files
from diffusers_repr.hub.identity import config_hash
from diffusers_repr.hub.load import load_json_config, resolve_folder
from diffusers_repr.models.semantic_encoder import SemanticEncoder

_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]


class SemanticSource(Source):
    """A `SemanticEncoder`: global features are its code, tokens the codes of the places, whose mean it is.

    Args:
        model: The network.
        image_size: (H, W) or a side to resize to; None: the size it was trained on, or as the images are.

    Raises:
        ValueError: For no size.
    """

    mean, std = (0.5,), (0.5,)

    def __init__(self, model: SemanticEncoder, image_size: int | tuple[int, int] | None = None) -> None:
        config = model.config
        self.module, self.channels, self.dim = model, int(config["in_channels"]), int(config["code_dim"])
        size = config["sample_size"] if image_size is None else image_size
        self.image_size = pair(size if isinstance(size, int) or size is None else (int(size[0]), int(size[1])))

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As given, or as it is."""
        return self.image_size or size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the last stage."""
        assert isinstance(self.module, SemanticEncoder)
        return self.module.grid(size)

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """One forward."""
        found = self.module(pixels.to(floating_dtype(self.module)))
        return found.code, FeatureMap.from_map(found.map).tokens(), (found.map.shape[2], found.map.shape[3])

    def describe(self) -> dict[str, Any]:
        """Class, config and size."""
        assert isinstance(self.module, SemanticEncoder)
        return {
            "model": type(self.module).__name__,
            "config": config_hash(dict(self.module.config)),
            "image_size": None if self.image_size is None else list(self.image_size),
        }


# Class of a network -> what loads and reads it.
OWN: dict[str, tuple[Any, Callable[..., Source]]] = {"SemanticEncoder": (SemanticEncoder, SemanticSource)}


def load_own(
    id_or_folder: str | Path,
    revision: str | None,
    token: str | None,
    dtype: torch.dtype,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[Source, str | None] | None:
    """A network of this package as an encoder, and the revision that was loaded; None for what is none.

    Args:
        id_or_folder: Of the network.
        revision: On the Hub.
        token: Of the Hub.
        dtype: Of the network.
        image_size: See `SemanticSource`.

    Raises:
        ValueError: For files that are damaged, or lack weights.
    """
    config = load_json_config(id_or_folder, "config.json", revision, token)
    if config.get("_class_name") not in OWN:
        return None
    check_config(config, f"config.json of {str(id_or_folder)!r}")
    cls, source = OWN[str(config["_class_name"])]
    folder = resolve_folder(id_or_folder, revision, token, _FILES)
    check_weight_files(folder)
    model: nn.Module = cls.from_pretrained(folder, torch_dtype=dtype)
    model.requires_grad_(False).eval()
    commit = folder.name if folder.parent.name == "snapshots" else None
    return source(model, image_size), commit or revision


def refuse_options(**options: Any) -> None:
    """Refuse what is an option of networks of transformers alone.

    Raises:
        ValueError: With the options that were given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: of networks of transformers; this encoder has none. Leave it out.")


__all__ = ["OWN", "SemanticSource", "load_own", "refuse_options"]
