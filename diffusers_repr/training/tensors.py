"""Sharded and plain tensors by one set of functions: the local shard, the full tensor, writing a full one back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP holds this tensor in shards."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that lies here; a view, so that changes in place reach the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, apart from the original; a collective call for sharded ones."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Write a full tensor into a plain or sharded one of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if tensor.shape != value.shape:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} cannot take one of {tuple(value.shape)}.")
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
    else:
        tensor.copy_(value)
