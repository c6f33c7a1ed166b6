"""Noise levels as a recipe keeps them, and the libraries whose versions it tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers_repr.hub.base_record import Level
from diffusers_repr.noise import NoiseLevel

PACKAGES = ("diffusers-repr", "diffusers", "torch", "transformers")


def recorded_levels(levels: Sequence[NoiseLevel], asked: Any) -> tuple[Level, ...]:
    """What was asked for, and what it came to.

    Args:
        levels: Resolved.
        asked: The timestep or list of them as the user gave it; None: the levels themselves.
    """
    requests = list(asked) if isinstance(asked, (list, tuple, range)) else [asked]
    if asked is None:
        requests = [level.timestep for level in levels]
    found = []
    for level, request in zip(levels, requests, strict=True):
        assert level.timestep is not None
        assert level.nsr is not None
        if isinstance(request, NoiseLevel) and not request.resolved:
            fields = {k: v for k in ("timestep", "nsr", "half_log_snr") if (v := getattr(request, k)) is not None}
        else:
            fields = {"timestep": level.timestep}
        values = {k: float(v) for k, v in fields.items()}
        found.append(Level(values, float(level.timestep), float(level.nsr)))
    return tuple(found)


__all__ = ["PACKAGES", "recorded_levels"]
