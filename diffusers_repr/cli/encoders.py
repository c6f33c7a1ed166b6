"""Encoders as commands name them: a vision transformer, or `MODEL:layer@timestep`, a layer of a denoiser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.encoders import Encoder


def split_layer(spec: str) -> tuple[str, str, float] | None:
    """Model, layer and timestep of `MODEL:layer@timestep`; None for another word.

    Example:
        >>> split_layer("models/ddpm:mid_block@100")
        ('models/ddpm', 'mid_block', 100.0)
    """
    found = re.fullmatch(r"(.+):([^:@]+)@([0-9.]+)", spec)
    return None if found is None else (found[1], found[2], float(found[3]))


def layer_encoder(spec: str, denoiser: Denoiser, seed: int) -> Encoder:
    """The encoder of `MODEL:layer@timestep`.

    Args:
        spec: As given.
        denoiser: The model.
        seed: Of the noise.
    """
    from diffusers_repr.encoders import Encoder

    parts = split_layer(spec)
    assert parts is not None
    level = parts[2]
    timestep = int(level) if level.is_integer() else level
    return Encoder.from_denoiser(denoiser, parts[1], timestep, noise_seed=seed, name=spec)
