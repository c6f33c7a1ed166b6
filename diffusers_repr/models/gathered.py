"""`gathered`: the rows of all processes, for losses that compare samples; gradients come back to where they belong."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.count :][: ctx.count]


def gathered(rows: Tensor) -> Tensor:
    """The rows `(B, ...)` of all processes in the order of their ranks, `(processes B, ...)`.

    Args:
        rows: As many in every process. The gradient of each is the sum over the processes' losses.
    """
    return _Gathered.apply(rows)


__all__ = ["gathered"]
