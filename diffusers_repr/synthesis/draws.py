"""Random numbers of one image, made of a seed and what the image is: no order, batch or process changes them."""

from __future__ import annotations

import hashlib
import json

_BITS = 53  # what a float64 holds exactly


def seed_of(seed: int, *what: str | int) -> int:
    """A seed for `torch.Generator`, 0 to 2^63 - 1, of its own for everything that is named.

    Args:
        seed: Of the whole.
        *what: Names and numbers: the source, the variant.

    Example:
        >>> seed_of(0, "a", 1) == seed_of(0, "a", 1), seed_of(0, "a", 1) == seed_of(0, "a", 2)
        (True, False)
    """
    return int.from_bytes(_digest(seed, what)[:8], "big") >> 1


def uniform_of(seed: int, *what: str | int) -> float:
    """A number from 0 and below 1; see `seed_of`."""
    return (int.from_bytes(_digest(seed, what)[8:16], "big") >> (64 - _BITS)) / 2**_BITS


def shuffled(count: int, seed: int, *what: str | int) -> list[int]:
    """The numbers below `count` in an order of its own for everything that is named."""
    return sorted(range(count), key=lambda place: _digest(seed, (*what, place)))


def _digest(seed: int, what: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *what]).encode()).digest()


__all__ = ["seed_of", "shuffled", "uniform_of"]
