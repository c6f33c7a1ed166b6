"""The settings of `ReadoutGuidance`, checked and in one form."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.guidance.readout.losses import Box, Point
from diffusers_repr.heads import MapHead


def _tensor(name: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array; got {type(value).__name__}.") from error
    if found.is_complex() or not found.numel():
        raise ValueError(f"{name} must hold real numbers; got {found.dtype} of shape {tuple(found.shape)}.")
    found = found.detach() if found.is_floating_point() else found.float()
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite.")
    return found


def target(value: Any, head: MapHead) -> Tensor:
    """As `(B, C, H, W)`, with the channels and in the range of the head's labels."""
    found, channels = _tensor("target", value), int(head.config.get("out_channels", 1))
    shape = tuple(found.shape)
    while 2 <= found.ndim < 4:
        found = found[None]
    if found.ndim != 4 or found.shape[1] != channels:
        allowed = f"({channels}, H, W) or (B, {channels}, H, W)"
        allowed = f"(H, W), {allowed}" if channels == 1 else allowed
        raise ValueError(f"target of this head must be {allowed}; got {shape}.")
    low, high = head.range
    slack = 1e-3 * (high - low)
    least, most = float(found.min()), float(found.max())
    if least < low - slack or most > high + slack:
        raise ValueError(
            f"target spans {least:g} to {most:g}; this head's labels lie in [{low:g}, {high:g}]. Map it there."
        )
    return found


def mask(value: Any) -> Tensor:
    """As `(B, 1, H, W)`, in [0, 1] and not all 0."""
    found = _tensor("mask", value)
    shape = tuple(found.shape)
    if found.ndim in (2, 3):
        found = found.reshape(-1, 1, *shape[-2:])
    if found.ndim != 4 or found.shape[1] != 1:
        raise ValueError(f"mask must be (H, W), (B, H, W) or (B, 1, H, W); got {shape}.")
    low, high = float(found.min()), float(found.max())
    if low < 0 or high > 1:
        raise ValueError(f"mask must lie in [0, 1]; got {low:g} to {high:g}.")
    if not bool(found.flatten(1).any(1).all()):
        raise ValueError("mask is 0 everywhere: nothing would be compared.")
    return found


def reference(value: Any) -> Tensor:
    """As `(B, C, h, w)`."""
    found = _tensor("reference", value)
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4:
        raise ValueError(f"reference must be x_0, (C, h, w) or (B, C, h, w); got {tuple(found.shape)}.")
    return found


def _whole(name: str, value: Any, shape: str) -> tuple[int, ...]:
    items = tuple(value.tolist() if isinstance(value, Tensor) else value) if hasattr(value, "__iter__") else ()
    numbers = [v for v in items if isinstance(v, Integral) and not isinstance(v, bool)]
    if len(items) != len(shape.split(",")) or len(numbers) != len(items) or any(v < 0 for v in numbers):
        raise ValueError(f"{name} must be ({shape}) in whole pixels of the readout, from 0; got {value!r}.")
    return tuple(int(v) for v in numbers)


def points(value: Any) -> tuple[tuple[Point, Point], ...]:
    """As pairs of points of whole numbers."""
    pairs = list(value) if hasattr(value, "__iter__") else []
    if not pairs or any(not hasattr(pair, "__len__") or len(pair) != 2 for pair in pairs):
        raise ValueError(f"points must be pairs ((y, x) in the reference, (y, x) in the sample); got {value!r}.")
    return tuple(tuple(_whole("A point", p, "y, x") for p in pair) for pair in pairs)  # type: ignore[misc]


def boxes(value: Any) -> tuple[Box, Box]:
    """As two boxes of whole numbers, none of them empty."""
    if not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"boxes must be two, the reference's and the samples'; got {value!r}.")
    found = tuple(_whole("A box", box, "top, left, bottom, right") for box in value)
    for top, left, bottom, right in found:
        if top >= bottom or left >= right:
            raise ValueError(f"A box must have top < bottom and left < right; got {(top, left, bottom, right)}.")
    return found  # type: ignore[return-value]


def row(value: Any) -> None:
    """Raise ValueError unless `value` is the number of a row."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"reference_row must be the number of a sample, from 0; got {value!r}.")
