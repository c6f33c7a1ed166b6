"""Rows of a batch, in whatever nesting of arguments a network is called with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_repr.denoiser.family import Family

# Arguments without a batch dimension, whose first dimension may still happen to equal the number of rows.
UNBATCHED = frozenset({"image_rotary_emb", "rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks", "ip_mask"})


def without_rows(family: Family) -> frozenset[str]:
    """Names of arguments, of a network of this family and of its modules, that have no row a sample.

    Example:
        >>> from diffusers_repr.denoiser.families.ltx import LTXFamily
        >>> "image_rotary_emb" in UNBATCHED, "image_rotary_emb" in without_rows(LTXFamily())
        (True, False)
    """
    return (UNBATCHED | set(family.unbatched)) - set(family.batched)


def map_rows(value: Any, rows: int, change: Callable[[Tensor], Tensor], unbatched: Collection[str] = UNBATCHED) -> Any:
    """`change` every tensor with `rows` rows in nested dicts, lists and tuples; containers are new, the rest is kept.

    Args:
        value: Arguments of a call, or one of them.
        rows: First dimension of the tensors that are batched.
        change: From a tensor to another.
        unbatched: Names that are left alone, with all they hold.

    Example:
        >>> import torch
        >>> map_rows({"x": torch.ones(2, 3), "scale": 2.0}, 2, lambda t: t[:1])["x"].shape
        torch.Size([1, 3])
    """
    if isinstance(value, Tensor):
        batched = value.ndim and value.shape[0] == rows and not isinstance(value, nn.Parameter)
        return change(value) if batched else value
    if isinstance(value, Mapping):
        return {k: v if k in unbatched else map_rows(v, rows, change, unbatched) for k, v in value.items()}
    if type(value) in (tuple, list):  # not torch.Size
        return type(value)(map_rows(item, rows, change, unbatched) for item in value)
    return value


def index_batch(value: Any, rows: int, which: slice, unbatched: Collection[str] = UNBATCHED) -> Any:
    """Only some rows of every batched tensor; containers are new."""
    if which == slice(0, rows):
        return map_rows(value, rows, lambda t: t, unbatched)
    return map_rows(value, rows, lambda t: t[which], unbatched)
