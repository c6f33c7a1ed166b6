"""Checks of plain numbers, with one form of message."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any


class NotWholeError(TypeError, ValueError):
    """What is no whole number: of a wrong type, or by its users' lights of a wrong value."""


def check_whole(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """A whole number from `low` to `high`, both included.

    Raises:
        NotWholeError: For what is no whole number; `True` and 2.0 are none.
        ValueError: Outside of the range.

    Example:
        >>> check_whole("num_inference_steps", 0)
        Traceback (most recent call last):
        ...
        ValueError: num_inference_steps must be a whole number from 1; got 0.
    """
    allowed = f"{name} must be a whole number from {low}" + ("" if high is None else f" to {high}")
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise NotWholeError(f"{allowed}; got {value!r}.")
    if whole < low or (high is not None and whole > high):
        raise ValueError(f"{allowed}; got {whole}.")
    return whole


def check_sizes(**values: Any) -> None:
    """Sizes that a config keeps: whole numbers from 1, of Python's own type.

    Raises:
        ValueError: With the name of the first that is none.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")


def check_channels(layers: Sequence[str], channels: Sequence[int]) -> None:
    """Named layers, each once, and the channels of each.

    Raises:
        ValueError: If they do not pair up, or channels are no whole numbers from 1.
    """
    if not layers or len(set(layers)) != len(layers) or len(layers) != len(channels):
        raise ValueError(
            f"layers and channels must pair up, each layer once; got {len(layers)} layers ({list(layers)}) and "
            f"{len(channels)} channels ({list(channels)})."
        )
    check_sizes(**{f"channels of {layer!r}": count for layer, count in zip(layers, channels, strict=True)})


__all__ = ["NotWholeError", "check_channels", "check_sizes", "check_whole"]
