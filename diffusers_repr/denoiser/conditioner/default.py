"""The conditioner that a network has unless it is given another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.captions import CaptionConditioner
from diffusers_repr.denoiser.conditioner.inputs import Cache
from diffusers_repr.denoiser.conditioner.labels import LabelConditioner
from diffusers_repr.denoiser.conditioner.layouts import LayoutConditioner
from diffusers_repr.denoiser.conditioner.tensors import VectorConditioner
from diffusers_repr.denoiser.family import Family, floating_dtype
from diffusers_repr.denoiser.family_registry import family_of


def default_conditioner(family: Family) -> Conditioner:
    """By what the family tells: captions, layouts, labels, vectors where there are no classes; unbound."""
    if family.conditioning == "text":
        return CaptionConditioner()
    if family.map_channels():
        return LayoutConditioner()
    if not family.classes()[0] and family.vector_input() is not None:
        return VectorConditioner()
    return LabelConditioner()


def bare_conditioner(model: nn.Module, conditioner: Conditioner | None = None) -> Conditioner:
    """A conditioner for a network without a Denoiser, as pipelines have it.

    Args:
        model: Of a known family.
        conditioner: Another than the default one.
    """
    family = family_of(model)
    return (conditioner or default_conditioner(family)).bound_to(_Network(model, family))


@dataclass
class _Network:
    """`Conditioned`, of a network alone."""

    model: nn.Module
    family: Family
    pipe: Any = None
    prompts: Cache | None = None

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return floating_dtype(self.model)


__all__ = ["bare_conditioner", "default_conditioner"]
