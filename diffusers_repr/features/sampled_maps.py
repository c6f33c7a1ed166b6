"""`SampledMaps`: features of pixels, without ever holding the features of all pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

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
        self._widths: list[int] = []  # channels of each map
        self._parts: dict[tuple[int, int], list[Tensor]] = {}  # grid -> batches, its maps side by side, (B, h, w, C)
        self._axes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def add(self, maps: Sequence[Tensor]) -> None:
        """The maps `(B, C, h, w)` of further images, in the same order each time.

        Raises:
            ValueError: If they differ in number, grid or channels from those before.
            OverflowError: If a value does not fit into float16.
        """
        grids, widths = [(m.shape[2], m.shape[3]) for m in maps], [m.shape[1] for m in maps]
        if self._parts and (grids, widths) != (self.grids, self._widths):
            raise ValueError(f"Maps {[tuple(m.shape) for m in maps]} do not go with those before, of {self.grids}.")
        joined = {}
        for grid in dict.fromkeys(grids):
            same = [m.detach().to("cpu", self.dtype).permute(0, 2, 3, 1) for m, g in zip(maps, grids, strict=True)
                    if g == grid]  # fmt: skip
            joined[grid] = torch.cat(same, 3).contiguous()
            if self.dtype == torch.float16 and not bool(joined[grid].isfinite().all()):
                raise OverflowError("Features are too large for float16; hold them as float32.")
        if not self._parts:
            self.grids, self._widths, self._parts = grids, widths, {grid: [] for grid in joined}
        for grid, held in joined.items():
            self._parts[grid].append(held)

    @property
    def channels(self) -> int:
        """Values of a pixel's feature."""
        return sum(self._widths)

    @property
    def columns(self) -> list[list[slice]]:
        """Of each block of `blocks`, which columns of a pixel's feature it holds, in its order."""
        ends = list(itertools.accumulate(self._widths))
        places = [slice(end - width, end) for end, width in zip(ends, self._widths, strict=True)]
        return [[place for place, own in zip(places, self.grids, strict=True) if own == grid] for grid in self._parts]

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(m.nbytes for part in self._parts.values() for m in part)

    def sample(self, rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Features of pixels, `(n, L)` float32.

        Args:
            rows: `(n,)`, number of the image in the order of `add`.
            y: `(n,)`, row of the pixel in the image, from 0.
            x: `(n,)`, column.
        """
        features = torch.empty(len(rows), self.channels)
        for block, columns in zip(self.blocks(rows, y, x), self.columns, strict=True):
            parts = block.split([place.stop - place.start for place in columns], 1)
            for part, place in zip(parts, columns, strict=True):
                features[:, place] = part
        return features

    def blocks(self, rows: Tensor, y: Tensor, x: Tensor) -> list[Tensor]:
        """Features of pixels in parts `(n, L_g)`, one of each grid: `sample` without bringing them into one order.

        Args:
            rows: As for `sample`.
            y: As for `sample`.
            x: As for `sample`.
        """
        found = []
        for grid, table in self._flat():
            start = rows.long() * (grid[0] * grid[1])
            if grid == self.size:  # the pixel's own cell
                found.append(table[start + y * grid[1] + x].float())
                continue
            if grid not in self._axes:
                self._axes[grid] = [_along(length, cells) for length, cells in zip(self.size, grid, strict=True)]
            places, weights = _corners(self._axes[grid], y, x, grid[1])
            places += start[:, None]
            if table.dtype == torch.float32:
                found.append(nn.functional.embedding_bag(places, table, per_sample_weights=weights, mode="sum"))
            else:
                found.append((table[places].float() * weights[..., None]).sum(1))
        return found

    def _flat(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Each grid and its maps of all images as a table of places, `(N h w, C)`; batches are not held besides."""
        for grid, part in self._parts.items():
            part[:] = [torch.cat(part)] if len(part) > 1 else part
            yield grid, part[0].flatten(0, 2)


def _corners(axes: Sequence[tuple[Tensor, Tensor]], y: Tensor, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The four cells of an image around each pixel, `(n, 4)`, and their bilinear weights."""
    (above, down), (left, across) = axes
    cells = (width * above)[y][:, :, None] + left[x][:, None]
    return cells.flatten(1), (down[y][:, :, None] * across[x][:, None]).flatten(1)


def _along(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Of each place on an axis, the cells before and after its centre and the share of each, `(size, 2)`."""
    place = ((torch.arange(size).float() + 0.5) * (cells / size) - 0.5).clamp(0, cells - 1)
    low = place.floor().long()
    share = place - low
    return torch.stack([low, (low + 1).clamp(max=cells - 1)], 1), torch.stack([1 - share, share], 1)


__all__ = ["STORED", "SampledMaps", "feature_maps"]
