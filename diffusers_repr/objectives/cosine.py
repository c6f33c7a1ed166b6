"""Mean cosine between the rows of two tensors, by passes over pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-8  # norms below count as this, as in torch.nn.functional.cosine_similarity
PIECE = 2**17  # numbers of one piece on the CPU


class _MeanCosine(torch.autograd.Function):
    """`mean cos(a, b)` over rows; a gradient for `a` alone.

    For one row it is `b / (|a| |b|) - a (a b) / (|a|^3 |b|)`: besides the data only two numbers a row, so nothing of
    the size of the data is kept, and the gradient is written in place.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        rows, others = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        dot, length, other = torch.empty(3, len(rows), dtype=wide, device=a.device)
        for part in _parts(rows):
            x, y = rows[part].to(wide), others[part].to(wide)
            torch.linalg.vecdot(x, y, out=dot[part])
            torch.linalg.vector_norm(x, dim=-1, out=length[part])
            torch.linalg.vector_norm(y, dim=-1, out=other[part])
        inverse = 1 / (length.clamp(min=EPS) * other.clamp(min=EPS))
        cosine = dot * inverse
        ctx.save_for_backward(a, b, inverse, torch.where(length > EPS, cosine / length.square(), 0.0))
        return cosine.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        a, b, inverse, pull = ctx.saved_tensors
        rows, others = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        share = upstream / len(rows)
        inverse, pull = (share * inverse)[:, None], (-share * pull)[:, None]
        grad = torch.empty_like(rows)
        for part in _parts(rows):
            x, y = rows[part].to(inverse.dtype), others[part].to(inverse.dtype)
            target = grad[part] if grad.dtype == inverse.dtype else torch.empty_like(x)
            torch.mul(y, inverse[part], out=target).addcmul_(x, pull[part])
            if grad.dtype != inverse.dtype:
                grad[part] = target
        return grad.view(a.shape), None


def _parts(rows: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all rows of the cosine between rows, in float32 or wider.

    Args:
        a: `(..., D)`.
        b: Of the same shape; it gets no gradient.

    Example:
        >>> float(mean_cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 1.0]])))
        0.5
    """
    return _MeanCosine.apply(a, b.detach())


__all__ = ["mean_cosine"]
