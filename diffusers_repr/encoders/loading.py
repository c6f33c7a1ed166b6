"""Encoders of a recipe: several at once, each with its positions, and names of which no two are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers_repr.encoders.encoder import Encoder
from diffusers_repr.encoders.positions import Positions, check_positions


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


__all__ = ["distinct_names", "iter_encoders", "load_encoders", "spread_positions"]
