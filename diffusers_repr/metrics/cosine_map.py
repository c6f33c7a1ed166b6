"""Cosine of vectors with every pixel of an enlarged feature map, exactly, without making that map.

DIFT (arXiv 2306.03881) brings a feature map f of h x w cells to the image's H x W pixels bilinearly and takes the
cosine of a vector s with the feature u(q) of each pixel q. With the weights w_i(q) of the four cells around q,

    <u(q), s> = sum_i w_i(q) <f_i, s>        |u(q)|^2 = sum_ij w_i(q) w_j(q) <f_i, f_j>

so that the numerator is the enlarged map of low-resolution inner products, and the squared norm is made of ten inner
products of neighbouring cells, which stand in five maps: a cell with itself, its right, its lower and both its
diagonal neighbours. Nothing of C channels and H x W pixels is ever held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole

_VALUES = 2**23  # of similarity maps that are held at a time, 32 MiB
_FLAT = 1e-10  # of the squared norm of the cells around: below it a sum of opposite vectors is rounding


class _Axis(NamedTuple):
    """One side of a bilinear resize: output k is `(1 - part) * input[low] + part * input[high]`."""

    low: Tensor
    high: Tensor  # the next cell; the last one is its own, with part 0
    part: Tensor


def sample_map(feature_map: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Features of points of an image: what its map, resized bilinearly to the image, holds there.

    Pixel x of W has the place `(x + 0.5) w / W - 0.5` on w cells (`align_corners=False`); what lies beyond the middle
    of the outermost cell is that cell. At whole pixels this equals `interpolate` to (H, W) and indexing.

    Args:
        feature_map: `(C, h, w)`.
        points: `(N, 2)` as (x, y) in pixels, the centre of the first pixel at (0, 0).
        size: (H, W) of the image.

    Returns:
        `(N, C)` float32.

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 2, 4)
        >>> sample_map(ramp, torch.tensor([[0, 0], [3, 1], [7, 3]]), (4, 8)).flatten()
        tensor([0.0000, 1.2500, 3.0000])
    """
    _check_map(feature_map, size)
    f = feature_map.float()
    y, x = (_places(points[:, axis], f.shape[2 - axis], size[1 - axis], f) for axis in (1, 0))
    above, below = (torch.lerp(f[:, row, x.low], f[:, row, x.high], x.part) for row in (y.low, y.high))
    return torch.lerp(above, below, y.part).T.contiguous()


class CosineMap:
    """The cosine of vectors with every pixel of an image whose feature map is small.

    Made once for an image, it serves any number of vectors. Memory: the map, and `chunk * H * W` values.

    Args:
        feature_map: `(C, h, w)`.
        size: (H, W) of the image, of any ratio to the map.
        chunk: Vectors at a time; None: as many as 32 MiB of similarities hold.

    Raises:
        ValueError: For another shape, a size below 1, or values that are not finite.

    Example:
        >>> found = CosineMap(torch.eye(4).reshape(4, 2, 2), (6, 6)).best(torch.eye(4)[[3]])
        >>> found.points, found.scores
        (tensor([[4., 4.]]), tensor([1.]))
    """

    def __init__(self, feature_map: Tensor, size: tuple[int, int], chunk: int | None = None) -> None:
        _check_map(feature_map, size)
        self.size = size
        self.chunk = max(1, _VALUES // (size[0] * size[1])) if chunk is None else check_whole("chunk", chunk)
        self.map = feature_map.float()
        self._inverse = _inverse_norms(self.map, size)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Cosine of each vector with each pixel, `(N, H, W)` float32 in [-1, 1]; of a vector of zeros 0.

        Args:
            vectors: `(N, C)`.

        Raises:
            ValueError: For vectors of another length.
        """
        parts = [self._similarity(part) for part in self._unit(vectors).split(self.chunk)]
        return torch.cat(parts) if parts else self._inverse.new_zeros(0, *self.size)

    def best(self, vectors: Tensor) -> BestPixels:
        """The pixel that is most like each vector, the first of equal ones in reading order.

        Args:
            vectors: `(N, C)`.

        Raises:
            ValueError: For vectors of another length.
        """
        scores, places = [], []
        for part in self._unit(vectors).split(self.chunk):
            found = self._similarity(part).flatten(1).max(1)
            scores.append(found.values)
            places.append(found.indices)
        score = torch.cat(scores) if scores else self._inverse.new_zeros(0)
        place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=score.device)
        width = self.size[1]
        return BestPixels(torch.stack([place % width, place // width], dim=1).float(), score)

    def _unit(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != len(self.map):
            raise ValueError(
                f"Vectors must be (N, {len(self.map)}), as the map's channels; got {tuple(vectors.shape)}."
            )
        return torch.nn.functional.normalize(vectors.to(self.map.device).float(), dim=1)

    def _similarity(self, unit: Tensor) -> Tensor:
        products = (unit @ self.map.flatten(1)).unflatten(1, self.map.shape[1:])
        return _enlarged(products, self.size).mul_(self._inverse).clamp_(-1, 1)


class BestPixels(NamedTuple):
    """`points` `(N, 2)` float32 as (x, y), and the cosine `scores` `(N,)` there."""

    points: Tensor
    scores: Tensor


def _inverse_norms(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """`1 / |u(q)|` of every pixel, `(H, W)` float32; 0 where cells cancel out.

    First along x, then along y: of two rows p and r with weights c and d,
    `|c p + d r|^2 = c^2 <p, p> + d^2 <r, r> + 2 c d <p, r>`.
    """
    h, w = feature_map.shape[1:]
    own, right, down, cross = _products(feature_map)
    if not bool(torch.isfinite(own).all()):
        raise ValueError("The feature map has NaN or infinite values; load the model in float32 or bfloat16.")
    y, x = (_places(torch.arange(n), cells, n, own) for n, cells in zip(size, (h, w), strict=True))
    a, b, c, d = 1 - x.part, x.part, 1 - y.part[:, None], y.part[:, None]
    within = a**2 * own[:, x.low] + b**2 * own[:, x.high] + 2 * a * b * right[:, x.low]  # (h, W): a row with itself
    between = a**2 * down[:, x.low] + b**2 * down[:, x.high] + a * b * cross[:, x.low]  # (h, W): a row with the next
    squared = c**2 * within[y.low] + d**2 * within[y.high] + 2 * c * d * between[y.low]
    largest = torch.stack([own[i][:, j] for i in y[:2] for j in x[:2]]).amax(0)  # of the cells around
    inverse = torch.where(squared > _FLAT * largest, squared.clamp(min=0).rsqrt(), 0.0)
    return inverse.float().to(feature_map.device)


def _products(feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner products of each cell with itself, the right, the lower and the diagonal ones (their sum), float64.

    All `(h, w)`; where there is no neighbour, 0. float64, since neighbours may all but cancel out. A few channels at a
    time, which stay in the processor's cache.
    """
    cells = feature_map.cpu() if feature_map.device.type == "mps" else feature_map  # no float64 there
    at_once = (2**15 if cells.device.type == "cpu" else 2**24) // cells[0].numel()
    own, right, down, cross = torch.zeros(4, *cells.shape[1:], dtype=torch.float64, device=cells.device)
    for part in cells.split(max(1, at_once)):
        f = part.double()
        own += (f * f).sum(0)
        right[:, :-1] += (f[:, :, :-1] * f[:, :, 1:]).sum(0)
        down[:-1] += (f[:, :-1] * f[:, 1:]).sum(0)
        cross[:-1, :-1] += (f[:, :-1, :-1] * f[:, 1:, 1:]).sum(0) + (f[:, :-1, 1:] * f[:, 1:, :-1]).sum(0)
    return own, right, down, cross


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`(N, h, w)` to `(N, H, W)`, bilinear; `interpolate` would round its weights to 5e-6 at 500 pixels."""
    y, x = (_places(torch.arange(n), cells, n, maps) for n, cells in zip(size, maps.shape[1:], strict=True))
    across = torch.lerp(maps[..., x.low], maps[..., x.high], x.part)
    return torch.lerp(across[:, y.low], across[:, y.high], y.part[:, None])


def _places(pixels: Tensor, cells: int, length: int, like: Tensor) -> _Axis:
    """Where pixels of `length` lie on so many cells; reckoned in float64, given in the dtype of `like`."""
    place = ((pixels.cpu().double() + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    low = place.floor()
    high = (low + 1).clamp(max=cells - 1)
    return _Axis(low.long().to(like.device), high.long().to(like.device), (place - low).to(like.device, like.dtype))


def _check_map(feature_map: Tensor, size: tuple[int, int]) -> None:
    if feature_map.ndim != 3 or not feature_map.numel():
        raise ValueError(f"A feature map is (C, h, w); got {tuple(feature_map.shape)}.")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"The size of an image is (H, W) from 1; got {size!r}.")


__all__ = ["BestPixels", "CosineMap", "sample_map"]
