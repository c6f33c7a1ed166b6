"""What recipes call their base: a denoiser's pipeline, or an encoder; how it is found, opened, and taken untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusers_repr.capture import check_layers
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.encoders import Encoder, load_encoder
from diffusers_repr.encoders.loading import split_layer
from diffusers_repr.hub.errors import is_repo_id
from diffusers_repr.tasks.evaluation.options import naming
from diffusers_repr.tasks.evaluation.recipe import EvaluationRecipe


class BaseKind:
    """A kind of base that tasks are fitted on."""

    def check(self, name: str) -> None:
        """Refuse what is neither there nor may be a Hub id.

        Raises:
            FileNotFoundError: Says what came.
        """
        raise NotImplementedError

    def open(self, recipe: EvaluationRecipe, device: str) -> Any:
        """The base of a recipe, trained, on a device."""
        raise NotImplementedError

    def untrained(self, base: Any, seed: int) -> Any:
        """The same network with the random weights that it starts training from."""
        raise NotImplementedError


class DenoiserBase(BaseKind):
    """The folder or Hub id of a pipeline."""

    def check(self, name: str) -> None:
        """A folder with a `model_index.json`, or a Hub id."""
        folder = Path(name).expanduser()
        if (folder / "model_index.json").is_file() or (not folder.exists() and is_repo_id(name)):
            return
        what = "has no model_index.json, so it is no pipeline" if folder.exists() else "is not here"
        raise FileNotFoundError(f"{name!r} {what}. Give a pipeline's folder or Hub id.")

    def open(self, recipe: EvaluationRecipe, device: str) -> Denoiser:
        """A `Denoiser`."""
        dtype = getattr(torch, recipe.dtype)
        found = Denoiser.from_pretrained(recipe.base_name, revision=recipe.revision, dtype=dtype)
        found.pipe.to(device)
        return found

    def untrained(self, base: Denoiser, seed: int) -> Denoiser:
        """All around the network is shared."""
        return untrained(base, seed)


class EncoderBase(BaseKind):
    """What `load_encoder` takes: a folder, a Hub id, `MODEL:layer@timestep`."""

    def check(self, name: str) -> None:
        """Of a layer, its model is a pipeline; of all else, a folder or Hub id."""
        layer = split_layer(name)
        if layer is not None:
            DenoiserBase().check(layer[0])
            return
        folder = Path(name).expanduser()
        if not folder.is_dir() and not is_repo_id(name):
            raise FileNotFoundError(
                f"{name!r} is not here. Give an encoder's folder or Hub id, or a layer of a pipeline: "
                "MODEL:layer@timestep."
            )

    def open(self, recipe: EvaluationRecipe, device: str) -> Encoder:
        """An `Encoder`."""
        layer = split_layer(recipe.base_name)
        found = load_encoder(
            recipe.base_name, revision=recipe.revision, dtype=getattr(torch, recipe.dtype), device=device
        )
        if layer is not None:
            source: Any = found.source
            check_layers(source.denoiser.model, layer[1])
        return found

    def untrained(self, base: Encoder, seed: int) -> Encoder:
        """As `Encoder.untrained`."""
        return base.untrained(seed)


DENOISER, ENCODER = DenoiserBase(), EncoderBase()


class Bases:
    """Bases by what recipes say of them; the last one is kept, so that recipes of one base load it once.

    Args:
        device: Where they run.
    """

    def __init__(self, device: str) -> None:
        self.device, self._held = device, {}  # type: ignore[var-annotated]

    def get(self, recipe: EvaluationRecipe, kind: BaseKind = DENOISER) -> Any:
        """The base of a recipe, trained, on the device; None if it names none.

        Args:
            recipe: Which names it.
            kind: Of the base.
        """
        if recipe.base is None:
            return None
        key = (type(kind), recipe.base_name, recipe.revision, recipe.dtype)
        if key not in self._held:
            self._held.clear()
            with naming(f"{recipe.file}: base"):
                self._held[key] = kind.open(recipe, self.device)
        return self._held[key]


__all__ = ["DENOISER", "ENCODER", "BaseKind", "Bases", "DenoiserBase", "EncoderBase"]
