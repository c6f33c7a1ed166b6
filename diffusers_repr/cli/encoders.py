"""Encoders as commands name them: a vision transformer, or `MODEL:layer@timestep`, a layer of a denoiser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.encoders import Encoder
    from diffusers_repr.encoders.image_text import ImageTextEncoder


def split_layer(spec: str) -> tuple[str, str, float] | None:
    """Model, layer and timestep of `MODEL:layer@timestep`; None for another word.

    Example:
        >>> split_layer("models/ddpm:mid_block@100")
        ('models/ddpm', 'mid_block', 100.0)
    """
    found = re.fullmatch(r"(.+):([^:@]+)@([0-9.]+)", spec)
    return None if found is None else (found[1], found[2], float(found[3]))


def open_encoder(
    spec: str, *, revision: str | None, dtype: str, positions: Any, text_space: bool, seed: int
) -> Encoder | ImageTextEncoder:
    """What gives a vector an image, on the CPU.

    Args:
        spec: A vision transformer, `MODEL:layer@timestep`, or with `text_space` a CLIP.
        revision: On the Hub.
        dtype: Of the network.
        positions: How position embeddings of a vision transformer are resampled.
        text_space: Whether vectors are of the space that images share with texts.
        seed: Of a denoiser's noise.

    Raises:
        ValueError: For a pipeline without a layer.
        TypeError, OSError: As `Encoder.from_pretrained` and `Denoiser.from_pretrained`.
    """
    import torch

    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.encoders import Encoder
    from diffusers_repr.encoders.image_text import ImageTextEncoder

    if (Path(spec) / "model_index.json").is_file():
        raise ValueError(
            f"{spec!r} is a pipeline; an encoder is a vision transformer, or a layer of a pipeline at a timestep, "
            f"such as {spec}:mid_block@100."
        )
    if text_space:
        return ImageTextEncoder.from_pretrained(spec, revision)
    layer = split_layer(spec)
    if layer is not None:
        denoiser = Denoiser.from_pretrained(layer[0], revision=revision, dtype=getattr(torch, dtype))
        return layer_encoder(spec, denoiser, seed)
    return Encoder.from_pretrained(spec, revision=revision, dtype=getattr(torch, dtype), positions=positions)


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
