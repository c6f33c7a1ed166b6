"""Square windows over images of any size, read in one batch, and their maps put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole


def window_places(size: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """(top, left) of windows of one side that cover an image, row by row.

    They lie side by side; the last of a row or column is moved inwards, over its neighbour.

    Args:
        size: (H, W) of the image.
        side: Of the windows, not longer than the image's shorter side.

    Raises:
        ValueError: For windows that do not fit in.

    Example:
        >>> window_places((4, 10), 4)
        [(0, 0), (0, 4), (0, 6)]
    """
    side = check_whole("side", side, high=min(size))
    rows, columns = ([min(at, whole - side) for at in range(0, whole, side)] for whole in size)
    return [(top, left) for top in rows for left in columns]


def cut_windows(images: Tensor, places: Sequence[tuple[int, int]], side: int) -> Tensor:
    """Windows `(len(places) * B, C, side, side)` of images `(B, C, H, W)`: all at the first place, and so on."""
    return torch.cat([images[..., top : top + side, left : left + side] for top, left in places])


def stitch_windows(
    maps: Tensor, places: Sequence[tuple[int, int]], side: int, size: tuple[int, int], stride: int
) -> Tensor:
    """Maps of windows to one map an image, `(B, C, H / stride, W / stride)`: the mean where windows overlap.

    Args:
        maps: `(len(places) * B, C, side / stride, side / stride)`, in the order of `cut_windows`.
        places: (top, left) of the windows in pixels.
        side: Of the windows, in pixels.
        size: (H, W) of the images.
        stride: Pixels per cell.

    Raises:
        ValueError: For sizes and places that are no multiples of the stride, and maps of other shapes.

    Example:
        >>> places = window_places((2, 3), 2)
        >>> stitch_windows(torch.tensor([0.0, 4.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2), places, 2, (2, 3), 1)
        tensor([[[[0., 2., 4.],
                  [0., 2., 4.]]]])
    """
    lengths = [*size, side, *(at for place in places for at in place)]
    if any(length % stride for length in lengths):
        raise ValueError(
            f"An image of {size[0]} x {size[1]} in windows of {side} has no whole cells of {stride} pixels at "
            f"{list(places)}; pad it to a multiple of {stride}."
        )
    cells = side // stride
    if len(maps) % len(places) or tuple(maps.shape[2:]) != (cells, cells):
        raise ValueError(
            f"{len(places)} windows of {cells} x {cells} cells are needed for each image; got {tuple(maps.shape)}."
        )
    found = maps.new_zeros(len(maps) // len(places), maps.shape[1], size[0] // stride, size[1] // stride)
    count = maps.new_zeros(1, 1, *found.shape[2:])
    for (top, left), window in zip(places, maps.chunk(len(places)), strict=True):
        rows = slice(top // stride, top // stride + cells)
        columns = slice(left // stride, left // stride + cells)
        found[:, :, rows, columns] += window
        count[:, :, rows, columns] += 1
    return found / count


__all__ = ["cut_windows", "stitch_windows", "window_places"]
