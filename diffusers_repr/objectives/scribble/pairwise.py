"""The regulariser of dense conditional random fields: pixels near in place and colour shall have one class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS = 1 << 24  # of one block of the dense kernel


def pairwise_energy(
    probabilities: Tensor,
    images: Tensor,
    *,
    sigma_colour: float = 15.0,
    sigma_place: float = 100.0,
    radius: int | None = None,
) -> Tensor:
    """`sum_ij W_ij (1 - <S_i, S_j>) / sum_ij W_ij`, the mean over a batch: from 0, one class, up to 1.

    `W_ij = exp(-|c_i - c_j|^2 / 2 sigma_colour^2 - |p_i - p_j|^2 / 2 sigma_place^2)` for i and j unlike, colours in
    [0, 255] (Tang et al. 2018, arXiv 1803.09569, relaxed Potts). `S_i^T S_j` is the chance that two pixels draw the
    same class. The code of ScribbleGen (arXiv 2311.17121) takes the sum without its denominator, up to a constant, at
    a weight of 2e-9; here the weight means the same for every size of images.

    Args:
        probabilities: `(B, K, H, W)`, of the classes, summing to 1.
        images: `(B, C, H, W)` in [-1, 1], of the same size.
        sigma_colour: Of the difference of colours, in 256ths.
        sigma_place: Of the distance, in pixels of these maps.
        radius: Pairs no farther apart along each axis; None: all pairs, at a cost of (HW)^2.

    Raises:
        ValueError: For maps of unequal sizes, sigmas that are not positive, and a radius below 1.

    Example:
        >>> one = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        >>> round(float(pairwise_energy(one, torch.zeros(1, 3, 2, 2))), 6)
        0.0
    """
    if probabilities.shape[2:] != images.shape[2:] or len(probabilities) != len(images):
        raise ValueError(
            f"Probabilities are {tuple(probabilities.shape)}, images {tuple(images.shape)}; bring them to one size."
        )
    if not (sigma_colour > 0 and sigma_place > 0) or (radius is not None and radius < 1):
        raise ValueError(
            f"Sigmas are positive and a radius at least 1; got {sigma_colour}, {sigma_place} and {radius}."
        )
    with torch.autocast(probabilities.device.type, enabled=False):
        wide = torch.promote_types(probabilities.dtype, torch.float32)
        shares, colours = probabilities.to(wide), images.to(wide) * (127.5 / sigma_colour)
        both = _dense if radius is None else _local
        unlike, weights = both(shares, colours, sigma_place, radius or 0)
        return (unlike / weights.clamp(min=torch.finfo(wide).tiny)).mean()


def _dense(shares: Tensor, colours: Tensor, sigma: float, radius: int) -> tuple[Tensor, Tensor]:
    """Weighted disagreement and weight of all pairs, `(B,)` each, some rows of the kernel in memory at a time."""
    height, width = shares.shape[2:]
    y, x = torch.meshgrid(*(torch.arange(n, device=shares.device) for n in (height, width)), indexing="ij")
    place = torch.stack([y, x]).to(shares.dtype) / sigma
    points = torch.cat([colours, place.expand(len(shares), -1, -1, -1)], 1).flatten(2).transpose(1, 2)
    classes = shares.flatten(2).transpose(1, 2)
    count = points.shape[1]
    rows = max(1, _PAIRS // (len(points) * count))
    unlike, weights = shares.new_zeros(len(shares)), shares.new_zeros(len(shares))
    for start in range(0, count, rows):
        own = slice(start, start + rows)
        with torch.no_grad():
            kernel = torch.exp(-0.5 * torch.cdist(points[:, own], points, compute_mode=_EXACT).square())
            kernel[:, range(kernel.shape[1]), range(start, start + kernel.shape[1])] = 0  # no pixel with itself
        agree = torch.einsum("bik,bij,bjk->b", classes[:, own], kernel, classes)
        total = kernel.sum((1, 2))
        unlike, weights = unlike + total - agree, weights + total
    return unlike, weights


_EXACT = "donot_use_mm_for_euclid_dist"  # by differences: products would round neighbours of equal colour


def _local(shares: Tensor, colours: Tensor, sigma: float, radius: int) -> tuple[Tensor, Tensor]:
    """As `_dense`, of the pairs in a window, one offset after the other; each pair is met once."""
    height, width = shares.shape[2:]
    unlike, weights = shares.new_zeros(len(shares)), shares.new_zeros(len(shares))
    for down in range(min(radius, height - 1) + 1):
        for right in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if (down, right) <= (0, 0):
                continue
            first = (slice(0, height - down), slice(max(0, -right), width - max(0, right)))
            second = (slice(down, height), slice(max(0, right), width - max(0, -right)))
            with torch.no_grad():
                apart = (colours[..., *first] - colours[..., *second]).square().sum(1)
                kernel = torch.exp(-0.5 * (apart + (down**2 + right**2) / sigma**2))
            agree = (shares[..., *first] * shares[..., *second]).sum(1)
            unlike = unlike + (kernel * (1 - agree)).sum((1, 2))
            weights = weights + kernel.sum((1, 2))
    return unlike, weights


def at_scale(maps: Tensor, scale: float) -> Tensor:
    """Maps `(B, C, H, W)` averaged to a share of their size, at least a pixel.

    Args:
        maps: Probabilities or images.
        scale: In (0, 1].
    """
    if scale == 1:
        return maps
    size = tuple(max(1, round(side * scale)) for side in maps.shape[2:])
    return F.interpolate(maps, size, mode="area")


__all__ = ["at_scale", "pairwise_energy"]
