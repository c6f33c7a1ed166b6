"""Bringing the token grids of a network and of an encoder together."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.encoders import Encoder, EncoderInfo

MatchGrid = Literal["resize_image", "pool_student", "interpolate_teacher"]
MODES: tuple[MatchGrid, ...] = ("resize_image", "pool_student", "interpolate_teacher")


def check_matching(mode: str | None) -> None:
    """Raise ValueError for an unknown way of matching grids."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"match_grid={mode!r}; expected None or one of {', '.join(MODES)}.")


def check_grids(
    student: tuple[int, ...], teacher: tuple[int, ...], mode: str | None, layer: str, encoder: str
) -> None:
    """Raise ValueError if the grids differ and `mode` does not bring them together."""
    if student == teacher:
        return
    if mode in (None, "resize_image"):
        raise ValueError(
            f"Layer {layer!r} has a token grid of {student[0]} x {student[1]}, encoder {encoder!r} one of "
            f"{teacher[0]} x {teacher[1]}. Choose match_grid: 'resize_image' (resize the encoder's input to the "
            "layer's grid), 'pool_student' (average the layer's tokens to the encoder's grid) or "
            "'interpolate_teacher' (resize the encoder's features to the layer's grid)."
        )
    if mode == "pool_student" and (student[0] < teacher[0] or student[1] < teacher[1]):
        raise ValueError(
            f"match_grid='pool_student' averages the layer's tokens to a coarser grid; layer {layer!r} has "
            f"{student[0]} x {student[1]}, encoder {encoder!r} {teacher[0]} x {teacher[1]}. Choose "
            "'interpolate_teacher' or 'resize_image'."
        )


def pool_tokens(tokens: FeatureMap, grid: tuple[int, ...]) -> FeatureMap:
    """Averages over the cells of a coarser grid; where it does not divide the finer one, cells overlap by a token.

    Example:
        >>> import torch
        >>> pool_tokens(FeatureMap(torch.tensor([[[1.0], [3.0]]]), (1, 2)), (1, 1)).tokens()
        tensor([[[2.]]])
    """
    if tokens.grid == grid:
        return tokens
    return tokens.with_map(F.adaptive_avg_pool2d(tokens.as_map(), (grid[0], grid[1])))


def interpolate_tokens(tokens: FeatureMap, grid: tuple[int, ...]) -> FeatureMap:
    """Bilinear resize of features to another grid, with antialiasing where it is coarser."""
    if tokens.grid == grid:
        return tokens
    resized = F.interpolate(tokens.as_map().float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
    return FeatureMap.from_map(resized)


def with_grid(encoder: EncoderInfo, grid: tuple[int, ...], size: tuple[int, int], layer: str) -> EncoderInfo:
    """An encoder that resizes its images such that its tokens lie on `grid`; shares the network with the given one.

    Args:
        encoder: An `Encoder`.
        grid: (h, w).
        size: Images' (H, W).
        layer: For the error.

    Raises:
        ValueError: If the encoder's input cannot be resized.
    """
    now = encoder.grid_for(size)
    if now == grid:
        return encoder
    if isinstance(encoder, Encoder):
        h, w = encoder.source.size(size)
        resized = encoder.with_image_size((h * grid[0] // now[0], w * grid[1] // now[1]))
        if resized.grid_for(size) == grid:
            return resized
    raise ValueError(
        f"match_grid='resize_image': the encoder {encoder.name!r} cannot be given images such that its grid is "
        f"{grid[0]} x {grid[1]}, that of layer {layer!r}; it has {now[0]} x {now[1]} at {size[0]} x {size[1]}. Choose "
        "'pool_student' or 'interpolate_teacher'."
    )


__all__ = [
    "MatchGrid",
    "check_grids",
    "check_matching",
    "interpolate_tokens",
    "pool_tokens",
    "with_grid",
]
