"""Layers that compute in the dtype of their input, whatever that of their weights.

A head of half-precision weights so computes in float32. The weights are read inside the layer's own call, where
layerwise casting and offloading have brought them; outside of it they may be stored in eight bits, or be elsewhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def wide_dtype(module: nn.Module) -> torch.dtype:
    """float64 for a module of float64 weights, else float32.

    Example:
        >>> wide_dtype(nn.Linear(1, 1).half()), wide_dtype(nn.Linear(1, 1).double())
        (torch.float32, torch.float64)
    """
    return torch.float64 if any(p.dtype == torch.float64 for p in module.parameters()) else torch.float32


def _like(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else _cast(value, x)


def _cast(value: Tensor, x: Tensor) -> Tensor:
    # A view: the backward pass needs what was used here, while layerwise casting then changes the parameter's data.
    return value.to(x.dtype).view(value.shape)


def keeping_weights(stored: torch.dtype, used: torch.dtype) -> AbstractContextManager[Any]:
    """Layers called inside keep for the backward pass the weights that they used.

    Layerwise casting changes a parameter's data after each call; torch's convolutions would find the stored ones.

    Args:
        stored: Dtype of the weights outside of their layers' calls.
        used: Dtype they are computed with; where it is the same, nothing is done.
    """
    if stored == used:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept)


class CastLinear(nn.Linear):
    """`nn.Linear` in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return functional.linear(x, _cast(self.weight, x), _like(self.bias, x))


class CastConv2d(nn.Conv2d):
    """`nn.Conv2d` in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, H, W)` to `(B, out, H', W')`."""
        # torch's own hook for a convolution with other weights, private: it knows the padding modes.
        return self._conv_forward(x, _cast(self.weight, x), _like(self.bias, x))


class Projection(nn.Conv2d):
    """A 1x1 convolution as a matrix product, which needs no other layout of the map, in the dtype of its input.

    Args:
        in_channels: Channels that enter.
        out_channels: Channels that leave.
        bias: Whether one is added.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, H, W)` to `(B, out, H, W)`."""
        y = torch.matmul(_cast(self.weight, x).flatten(1), x.flatten(2))
        if self.bias is not None:
            y = y + _cast(self.bias, x)[:, None]
        return y.unflatten(2, x.shape[2:])


class CastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`."""
        return functional.group_norm(x, self.num_groups, _like(self.weight, x), _like(self.bias, x), self.eps)


class CastLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`."""
        return functional.layer_norm(x, self.normalized_shape, _like(self.weight, x), _like(self.bias, x), self.eps)


class _CastBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What batch norms in the dtype of their input share."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`.

        Raises:
            ValueError: In training, for statistics of another dtype.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.running_mean.dtype == x.dtype:
            return super().forward(x)
        if self.training:
            raise ValueError(
                f"Batch norm is trained in float32: its running statistics need it; these are "
                f"{self.running_mean.dtype}. Cast the head with .float() before training."
            )
        mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        return functional.batch_norm(x, mean, variance, _like(self.weight, x), _like(self.bias, x), eps=self.eps)


class CastBatchNorm1d(_CastBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` in the dtype of its input; in training the running statistics must be of that dtype."""


class CastBatchNorm2d(_CastBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in the dtype of its input; in training the running statistics must be of that dtype."""


__all__ = [
    "CastBatchNorm1d",
    "CastBatchNorm2d",
    "CastConv2d",
    "CastGroupNorm",
    "CastLayerNorm",
    "CastLinear",
    "Projection",
    "keeping_weights",
    "wide_dtype",
]
