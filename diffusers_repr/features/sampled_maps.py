"""`SampledMaps`: features of pixels, without ever holding the features of all pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusers_repr.features.output import FeatureOutput

STORED = ("float32", "float16")


def feature_maps(output: FeatureOutput, layers: Sequence[str]) -> list[Tensor]:
    """The maps `(B, C, h, w)` of an output: levels in order, within each the layers in order.

    Raises:
        KeyError, ValueError: As `FeatureOutput.as_map`; for maps of videos.
    """
    maps = [one.as_map(layer) for _, one in output.per_level() for layer in layers]
    wrong = next((m for m in maps if m.ndim != 4), None)
    if wrong is not None:
        raise ValueError(f"A layer gave {tuple(wrong.shape)}, of videos; pixels are of images.")
    return maps


class SampledMaps:
    """Maps of images at their own resolution, from which the features of single pixels are read.

    A pixel's feature is what bilinear resizing of every map to the image's size gives there (corners not aligned),
    the maps side by side: `resize` and then index, in the memory of the maps alone. The features of all pixels of a
    256 px image with DDPM-Seg's layers take 2.2 GB; its maps 0.1 GB.

    Args:
        size: (H, W) in pixels of the images.
        dtype: Of the maps in memory: `float32`, or `float16` in half of it.

    Raises:
        ValueError: For another dtype.

    Example:
        >>> maps = SampledMaps((4, 4))
        >>> maps.add([torch.arange(4.0).view(1, 1, 2, 2), torch.ones(1, 2, 1, 1)])
        >>> maps.sample(torch.tensor([0, 0]), torch.tensor([0, 3]), torch.tensor([0, 0]))
        tensor([[0., 1., 1.],
                [2., 1., 1.]])
    """

    def __init__(self, size: tuple[int, int], dtype: str = "float32") -> None:
        if dtype not in STORED:
            raise ValueError(f"dtype={dtype!r}; maps are held as {' or '.join(STORED)}.")
        self.size, self.dtype = size, getattr(torch, dtype)
        self.grids: list[tuple[int, int]] = []
        self._parts: list[list[Tensor]] = []  # of each map the batches, (B, h, w, C)
        self._tables: list[Tensor] = []

    def add(self, maps: Sequence[Tensor]) -> None:
        """The maps `(B, C, h, w)` of further images, in the same order each time.

        Raises:
            ValueError: If they differ in number, grid or channels from those before.
            OverflowError: If a value does not fit into float16.
        """
        held = [m.detach().to("cpu", self.dtype).permute(0, 2, 3, 1).contiguous() for m in maps]
        if not self._parts:
            self.grids = [(m.shape[1], m.shape[2]) for m in held]
            self._parts = [[] for _ in held]
        if len(held) != len(self._parts) or any(
            (m.shape[1], m.shape[2]) != grid or (part and part[0].shape[3] != m.shape[3])
            for m, grid, part in zip(held, self.grids, self._parts, strict=True)
        ):
            raise ValueError(f"Maps {[tuple(m.shape) for m in maps]} do not go with those before, of {self.grids}.")
        if self.dtype == torch.float16 and not all(bool(m.isfinite().all()) for m in held):
            raise OverflowError("Features are too large for float16; hold them as float32.")
        for part, m in zip(self._parts, held, strict=True):
            part.append(m)
        self._tables = []

    @property
    def channels(self) -> int:
        """Values of a pixel's feature."""
        return sum(part[0].shape[3] for part in self._parts)

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(m.nbytes for part in self._parts for m in part)

    def sample(self, rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Features of pixels, `(n, L)` float32.

        Args:
            rows: `(n,)`, number of the image in the order of `add`.
            y: `(n,)`, row of the pixel in the image, from 0.
            x: `(n,)`, column.
        """
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        features, start = torch.empty(len(rows), self.channels), 0
        for grid, table in zip(self.grids, self._flat(), strict=True):
            if grid not in found:
                found[grid] = _corners(rows, y, x, self.size, grid)
            places, weights = found[grid]
            if table.dtype == torch.float32:
                part = nn.functional.embedding_bag(places, table, per_sample_weights=weights, mode="sum")
            else:
                part = (table[places].float() * weights[..., None]).sum(1)
            features[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        return features

    def _flat(self) -> list[Tensor]:
        """Each map of all images as a table of places, `(N h w, C)`; the batches are not held besides."""
        if not self._tables:
            for part in self._parts:
                part[:] = [torch.cat(part)] if len(part) > 1 else part
            self._tables = [part[0].flatten(0, 2) for part in self._parts]
        return self._tables


def _corners(
    rows: Tensor, y: Tensor, x: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The four cells around each pixel, `(n, 4)` places in a table, and their bilinear weights."""
    (y0, y1, v), (x0, x1, u) = _along(y, size[0], grid[0]), _along(x, size[1], grid[1])
    start = rows.long() * (grid[0] * grid[1])
    places = torch.stack([start + a * grid[1] + b for a in (y0, y1) for b in (x0, x1)], 1)
    return places, torch.stack([a * b for a in (1 - v, v) for b in (1 - u, u)], 1)


def _along(at: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cells before and after a pixel's centre on one axis, and the share of the second."""
    place = ((at.float() + 0.5) * (cells / size) - 0.5).clamp(0, cells - 1)
    low = place.floor().long()
    return low, (low + 1).clamp(max=cells - 1), place - low


__all__ = ["STORED", "SampledMaps", "feature_maps"]
