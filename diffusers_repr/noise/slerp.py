"""Between two samples of noise, on the sphere that such samples lie near."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """`sin((1 - w) a) / sin(a) x + sin(w a) / sin(a) y`, a being the angle of x and y, sample by sample.

    Between samples in the same direction, or opposite ones, it is the straight line.

    Args:
        first: x, `(B, ...)`, returned for a weight of 0.
        second: y, returned for 1.
        weight: w.

    Example:
        >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
        tensor([[0.7071, 0.7071]])
    """
    x, y = (value.double().flatten(1) for value in (first, second))
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (first.ndim - 1))
    sine = angle.sin()
    flat = sine < 1e-6
    sine = torch.where(flat, torch.ones_like(sine), sine)
    a = torch.where(flat, torch.full_like(sine, 1 - weight), ((1 - weight) * angle).sin() / sine)
    b = torch.where(flat, torch.full_like(sine, weight), (weight * angle).sin() / sine)
    return (a * first.double() + b * second.double()).to(first.dtype)


__all__ = ["slerp"]
