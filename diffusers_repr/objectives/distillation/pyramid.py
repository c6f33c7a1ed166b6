"""`PyramidRegressor`: a feature pyramid with pyramid pooling, from a student's stages to the teacher's channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """The map beside its means over 1, 2 x 2, 3 x 3 and 6 x 6 parts of it (PSPNet, arXiv 1612.01105).

    Args:
        channels: That enter.
        width: That leave.
        bins: Parts along a side.
    """

    def __init__(self, channels: int, width: int, bins: Sequence[int] = BINS) -> None:
        super().__init__()
        self.bins, inner = tuple(bins), max(width // len(bins), 1)
        # Without batch norm: of a mean over the whole image a batch has one value a channel and image.
        self.reduce = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU()) for _ in bins)
        self.leave = convolution(channels + inner * len(self.bins), width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, h, w)` to `(B, width, h, w)`."""
        size = tuple(x.shape[2:])
        parts = [x]
        for count, reduce in zip(self.bins, self.reduce, strict=True):
            parts.append(enlarged(reduce(F.adaptive_avg_pool2d(x, count)), size))
        return self.leave(torch.cat(parts, 1))


class PyramidRegressor(nn.Module):
    """DreamTeacher's regressor (arXiv 2307.07487, section 3.2): FPN of `width` channels, and a 1x1 a level.

    From the coarsest stage, which goes through pyramid pooling, down to the finest: 1x1 lateral, the coarser level
    enlarged and added, 3x3; each with batch norm and ReLU.

    Args:
        channels: Of the student's stages, finest first.
        targets: Of the teacher's levels, one a stage.
        width: Inside.

    Raises:
        ValueError: Without stages, or with another number of targets.
    """

    def __init__(self, channels: Sequence[int], targets: Sequence[int], width: int = 256) -> None:
        super().__init__()
        if not channels or len(channels) != len(targets):
            raise ValueError(f"One target a stage is needed; got {len(channels)} stages and {len(targets)} targets.")
        self.lateral = nn.ModuleList(convolution(count, width, 1) for count in channels[:-1])
        self.pooling = PyramidPooling(channels[-1], width)
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in channels)
        self.leave = nn.ModuleList(nn.Conv2d(width, count, 1) for count in targets)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps `(B, C_l, h_l, w_l)`, finest first, to the same sizes with the targets' channels."""
        levels = [self.pooling(maps[-1])]
        for value, lateral in zip(reversed(maps[:-1]), reversed(self.lateral), strict=True):
            levels.append(lateral(value) + enlarged(levels[-1], tuple(value.shape[2:])))
        levels.reverse()
        return [leave(smooth(x)) for x, smooth, leave in zip(levels, self.smooth, self.leave, strict=True)]


def convolution(channels: int, width: int, side: int) -> nn.Sequential:
    """A convolution that keeps the size, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, side, padding=side // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


def enlarged(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map at another size, bilinear."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


__all__ = ["BINS", "PyramidPooling", "PyramidRegressor"]
