"""Poolings of one layer's output, maps and tokens alike."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser.family import Grid
from diffusers_repr.denoiser.feature_map import FeatureMap

VECTORS = r"mean|max|adaptive:[1-9]\d{0,2}"  # poolings that leave vectors, as a pattern
POOLINGS = "'mean', 'max' or 'adaptive:P', P to 999"  # the same in words
MAPS = r"map:[1-9]\d{0,2}"  # those that leave maps


def tokens_to_map(tokens: Tensor, grid: tuple[int, ...], text_tokens: int = 0) -> Tensor:
    """`(B, T + H*W, C)` to `(B, C, H, W)`; see `FeatureMap`, which this is a short word for.

    Args:
        tokens: Rows of the image one after another, after `text_tokens` tokens of text.
        grid: (H, W) in tokens.
        text_tokens: T, dropped.

    Raises:
        ValueError: If the count does not fit the grid.
    """
    if tokens.ndim != 3 or tokens.shape[1] != text_tokens + math.prod(grid):
        raise ValueError(
            f"Tokens {tuple(tokens.shape)} do not fit {text_tokens} text tokens and a grid of "
            f"{' x '.join(map(str, grid))}."
        )
    return FeatureMap(tokens, tuple(grid), text_tokens).as_map()


def check_pooling(pooling: str | None) -> str | None:
    """The pooling, if it is one.

    Raises:
        ValueError: With the poolings there are.
    """
    if pooling is None or (isinstance(pooling, str) and re.fullmatch(f"{VECTORS}|{MAPS}", pooling)):
        return pooling
    raise ValueError(
        f"Unknown pooling {pooling!r}; expected {POOLINGS} (e.g. 'adaptive:2'), 'map:P' for maps of at most P x P "
        "cells, or None."
    )


def leaves_maps(pooling: str | None) -> bool:
    """Whether what a pooling leaves is still a map, with places."""
    return pooling is None or pooling.startswith("map:")


def is_linear(pooling: str | None) -> bool:
    """Whether pooling commutes with averaging over an ensemble."""
    return pooling != "max"


def pooled_size(pooling: str | None) -> int:
    """Values per channel that a pooling leaves (1 for `mean` and `max`)."""
    if pooling is None or leaves_maps(pooling):
        raise ValueError(f"pooling={pooling!r} leaves maps; choose {POOLINGS}, to get vectors.")
    return int(pooling.split(":")[1]) ** 2 if pooling.startswith("adaptive") else 1


def pool(feature: Tensor, pooling: str | None, place: Grid | None = None) -> Tensor:
    """Pool a map `(B, C, H, W)`, of a video `(B, C, frames, H, W)`, or tokens `(B, N, C)` in float32.

    Args:
        feature: Output of a layer.
        pooling: `mean` and `max` over all positions give `(B, C)`; `adaptive:P` averages over P x P cells and gives
            `(B, C * P * P)`, channel by channel (a grid with fewer than P cells a side repeats them); `map:P` averages
            over cells where a side has more than P of them and leaves a map `(B, C, min(H, P), min(W, P))`; None
            returns the feature as it is.
        place: For tokens, `((H, W), start)`: grid and first token of the image; others are left out. A video's grid is
            `(frames, H, W)`, and the cells of `adaptive:P` reach over all frames.

    Raises:
        ValueError: For an unknown pooling, tokens without a place, or a shape that is neither map nor tokens.

    Example:
        >>> pool(torch.ones(2, 3, 4, 4), "mean").shape
        torch.Size([2, 3])
        >>> pool(torch.ones(2, 3, 4, 4), "adaptive:2").shape
        torch.Size([2, 12])
    """
    if check_pooling(pooling) is None:
        return feature
    feature = feature.float()
    if feature.ndim == 2:
        return feature
    if feature.ndim == 3:
        if place is None:
            raise ValueError(f"Pooling tokens {tuple(feature.shape)} needs their grid; none is known for this layer.")
        feature = FeatureMap(feature, *place).as_map()
    elif feature.ndim not in (4, 5):
        raise ValueError(
            f"Cannot pool a feature of shape {tuple(feature.shape)}; expected (B, C, H, W), of a video "
            "(B, C, frames, H, W), or (B, N, C)."
        )
    axes = tuple(range(2, feature.ndim))
    if pooling == "mean":
        return feature.mean(dim=axes)
    if pooling == "max":
        return feature.amax(dim=axes)
    assert pooling is not None
    cells, side = feature if feature.ndim == 4 else feature.mean(dim=2), int(pooling.split(":")[1])
    if leaves_maps(pooling):
        return shrink(cells, (min(cells.shape[2], side), min(cells.shape[3], side)))
    return functional.adaptive_avg_pool2d(cells, side).flatten(1)


def shrink(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over cells, `(B, C, *size)`; maps of that size as they are."""
    return maps if tuple(maps.shape[2:]) == tuple(size) else functional.adaptive_avg_pool2d(maps, size)


def concatenate(features: list[Tensor]) -> Tensor:
    """Pooled features `(B, D_i)` side by side, `(B, sum D_i)`."""
    return torch.cat(features, dim=1)
