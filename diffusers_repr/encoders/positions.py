"""Position embeddings at another size than a network was made for: how transformers resamples them, and how REPA."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Positions = Literal["transformers", "repa"]


def check_positions(positions: str) -> Positions:
    """The word, if it is one.

    Raises:
        ValueError: With those there are.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions is one of {', '.join(map(repr, get_args(Positions)))}; got {positions!r}.")
    return positions  # type: ignore[return-value]


def resample_as_repa(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions of a square grid on another one: bicubic with antialiasing, in float32.

    REPA's code (arXiv 2410.06940) does so once to the table of the encoder, by timm's `resample_abs_pos_embed`, before
    the first image. Transformers resamples DINOv2 without antialiasing at every forward, and so does DINOv2's own code
    (by a scale that is 0.1 / side off, where transformers' is exact); from 37 x 37 places to 16 x 16 each then is read
    from few of those around it. Of DINOv2 with registers all three antialias.

    Args:
        table: `(1, 1 + side * side, D)`, that of the class token first; it stays as it is.
        grid: (h, w) in patches.

    Returns:
        `(1, 1 + h * w, D)` in the dtype of the table; the table itself where the grid is its own.

    Example:
        >>> resample_as_repa(torch.ones(1, 1 + 37 * 37, 2), (16, 16)).shape
        torch.Size([1, 257, 2])
    """
    side = math.isqrt(table.shape[1] - 1)
    if grid == (side, side):
        return table
    places = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    places = functional.interpolate(places, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :1], places.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _interpolate_pos_encoding(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
    """Stands for the method of this name of an embedding module of transformers."""
    patch = self.patch_embeddings.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return resample_as_repa(self.position_embeddings, (height // rows, width // columns))


def use_repa_positions(embeddings: nn.Module) -> None:
    """Let an embedding module of transformers resample its positions as REPA's code does, from now on.

    Only the method that resamples is put in front; the forward is upstream's. It is bound to the module, so that a
    copy of the network reads its own table.
    """
    bound: Any = MethodType(_interpolate_pos_encoding, embeddings)
    embeddings.interpolate_pos_encoding = bound


__all__ = ["Positions", "check_positions", "resample_as_repa", "use_repa_positions"]
