"""Encoders by what they are called: a folder or Hub id, or `MODEL:layer@timestep`; one, or several of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.encoder import Encoder
from diffusers_repr.encoders.pipelines import is_encoder_pipeline
from diffusers_repr.encoders.positions import Positions, check_positions


def load_encoder(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> Encoder:
    """An encoder by its name: what training wrote, a network of transformers, or a layer of a denoiser.

    Args:
        name: Folder or Hub id, or `MODEL:layer@timestep`.
        revision: On the Hub.
        dtype: Of the network.
        device: Where it goes.
        seed: Of a denoiser's noise.
        **options: Of `Encoder.from_pretrained`, for a folder or Hub id.

    Raises:
        ValueError: For a pipeline without a layer, and options that a layer of a denoiser does not have.
        TypeError, OSError: As `Encoder.from_pretrained` and `Denoiser.from_pretrained`.
    """
    spec = str(name)
    layer = split_layer(spec)
    if layer is None:
        check_encoder_name(spec)
        return Encoder.from_pretrained(spec, revision=revision, dtype=dtype, device=device, **options)
    if options:
        raise ValueError(f"{spec!r} is a layer of a denoiser, which has no {', '.join(options)}; leave it out.")
    denoiser = Denoiser.from_pretrained(layer[0], revision=revision, dtype=dtype)
    if denoiser.pipe is not None:
        denoiser.pipe.to(device)
    return layer_encoder(spec, denoiser, seed)


def check_encoder_name(spec: str) -> None:
    """Raise ValueError for the folder of a pipeline that has no encoder, where a layer of it is to be named."""
    if (Path(spec) / "model_index.json").is_file() and not is_encoder_pipeline(spec):
        raise ValueError(
            f"{spec!r} is a pipeline; an encoder is a vision transformer, or a layer of a pipeline at a timestep, "
            f"such as {spec}:mid_block@100."
        )


def split_layer(spec: str) -> tuple[str, str, float] | None:
    """Model, layer and timestep of `MODEL:layer@timestep`; None for another word.

    Example:
        >>> split_layer("models/ddpm:mid_block@100")
        ('models/ddpm', 'mid_block', 100.0)
    """
    found = re.fullmatch(r"(.+):([^:@]+)@([0-9.]+)", spec)
    return None if found is None else (found[1], found[2], float(found[3]))


def layer_encoder(spec: str, denoiser: Denoiser, seed: int = 0) -> Encoder:
    """The encoder of `MODEL:layer@timestep`.

    Args:
        spec: As given.
        denoiser: The model.
        seed: Of the noise.
    """
    parts = split_layer(spec)
    assert parts is not None
    level = parts[2]
    timestep = int(level) if level.is_integer() else level
    return Encoder.from_denoiser(denoiser, parts[1], timestep, noise_seed=seed, name=spec)


def load_encoders(names: Sequence[str], positions: Sequence[str] = (), **options: Any) -> list[Encoder]:
    """Vision transformers by folder or Hub id, as the recipes of training name them; see `iter_encoders`."""
    return list(iter_encoders(names, positions, **options))


def iter_encoders(names: Sequence[str], positions: Sequence[str] = (), **options: Any) -> Iterator[Encoder]:
    """As `load_encoders`, each loaded when it is its turn.

    Args:
        names: Folders or Hub ids.
        positions: `transformers` or `repa`, one for all or one each; none: `transformers`.
        **options: Of `Encoder.from_pretrained`, for all.

    Raises:
        ValueError: For an encoder that is named twice, or as many positions as do not fit.
        TypeError, ValueError, OSError: As `Encoder.from_pretrained`.
    """
    called = distinct_names(names)
    for name, short, how in zip(names, called, spread_positions(positions, len(names)), strict=True):
        yield Encoder.from_pretrained(name, positions=how, name=short, **options)


def spread_positions(positions: Sequence[str], count: int) -> list[Positions]:
    """The positions of each of `count` encoders.

    Raises:
        ValueError: For an unknown word, or neither one nor one an encoder.

    Example:
        >>> spread_positions(["repa"], 2)
        ['repa', 'repa']
    """
    checked = [check_positions(word) for word in positions] or [check_positions("transformers")]
    if len(checked) == 1 or not count:
        return checked[:1] * count
    if len(checked) != count:
        raise ValueError(
            f"{len(checked)} encoder_positions for {count} encoder{'s' * (count != 1)}; give one for all, or one each."
        )
    return checked


def distinct_names(names: Sequence[str]) -> list[str]:
    """What encoders or models are called: the last part of each folder or id, with those before it where two agree.

    Raises:
        ValueError: If one is named twice.

    Example:
        >>> distinct_names(["facebook/dinov2-base", "mine/teacher", "yours/teacher"])
        ['dinov2-base', 'mine-teacher', 'yours-teacher']
    """
    paths = [Path(name).resolve().parts for name in names]
    if len(set(paths)) < len(paths):
        twice = next(name for name, path in zip(names, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice!r} is named twice; name each once.")
    return [_shortest(path, [other for other in paths if other != path]) for path in paths]


def _shortest(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """As many last parts of a path as no other ends with."""
    for count in range(1, len(path)):
        if all(other[-count:] != path[-count:] for other in others):
            return "-".join(path[-count:])
    return "-".join(path)


__all__ = [
    "check_encoder_name",
    "distinct_names",
    "iter_encoders",
    "layer_encoder",
    "load_encoder",
    "load_encoders",
    "split_layer",
    "spread_positions",
]
