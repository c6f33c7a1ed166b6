"""The losses of Readout Guidance (Luo et al. 2024, arXiv 2312.02150), one number a sample; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Point = tuple[int, int]
Box = tuple[int, int, int, int]


def span(x: Tensor) -> Tensor:
    """Largest minus smallest value of each sample, `(B,)`, without gradient."""
    flat = x.detach().flatten(1)
    return flat.amax(1) - flat.amin(1)


def resize_target(target: Tensor, size: tuple[int, int]) -> Tensor:
    """A map `(B, C, H, W)` at another size: averaged over areas where it shrinks, bilinear where it grows."""
    height, width = target.shape[-2:]
    if (height, width) == tuple(size):
        return target
    shrinks = height >= size[0] and width >= size[1]
    return functional.interpolate(target, size, mode="area" if shrinks else "bilinear")


def spatial_loss(
    read: Tensor,
    target: Tensor,
    x: Tensor,
    label_range: tuple[float, float],
    *,
    rescale: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """`mean (phi(r) - phi(target))^2` with `phi(y) = (y - a) / (b - a) (M - m) + m`.

    (a, b) is the head's range and (m, M) the smallest and largest value of the sample's latents, constant in the
    gradient. phi is affine, so the loss is `mean (r - target)^2 ((M - m) / (b - a))^2`.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        target: `(B or 1, C, H, W)`.
        x: Latents, `(B, ...)`.
        label_range: (a, b).
        rescale: False leaves phi out.
        weights: Of places, `(B or 1, 1, H, W)`: a weighted mean.

    Returns:
        `(B,)`.
    """
    loss = _mean((read - target).square().mean(1, keepdim=True), weights)
    if not rescale:
        return loss
    low, high = label_range
    return loss * (span(x) / (high - low)).square().to(loss.dtype)


def appearance_loss(
    read: Tensor,
    reference: Tensor,
    x: Tensor,
    *,
    rescale: bool = True,
    weights: Tensor | None = None,
    boxes: tuple[Box, Box] | None = None,
    pooled: bool = False,
) -> Tensor:
    """`mean (1 - cos(r, r_reference)) (M - m)^2`, cosines over the channels at each place.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        reference: Those of the reference, the same shape.
        x: Latents, `(B, ...)`; (m, M) is their range.
        rescale: False leaves `(M - m)^2` out.
        weights: Of places, `(B or 1, 1, H, W)`: a weighted mean.
        boxes: Of the reference and of the samples, (top, left, bottom, right) in pixels of the readouts, the last two
            not included: both are resized to the whole map.
        pooled: Compare the means over the map (or the box) instead of places.

    Returns:
        `(B,)`.
    """
    if boxes is not None:
        size = (read.shape[2], read.shape[3])
        reference, read = (_crop(part, box, size) for part, box in zip((reference, read), boxes, strict=True))
    if pooled:
        reference, read = reference.mean((2, 3), keepdim=True), read.mean((2, 3), keepdim=True)
    loss = _mean(1 - functional.cosine_similarity(reference, read, dim=1)[:, None], weights)
    return loss * span(x).square().to(loss.dtype) if rescale else loss


def drag_loss(read: Tensor, reference: Tensor, points: Sequence[tuple[Point, Point]]) -> Tensor:
    """`-1/2 mean S[p1, p2] + 1/2 mean S[p1, p1]` with `S[p, q] = (cos(r_reference[p], r[q]) + 1) / 2`.

    The first part brings to p2 what the reference has at p1; the second removes what has stayed at p1.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        reference: Those of the reference, the same shape.
        points: Pairs (p1, p2), each point (y, x) in pixels of the readouts.

    Returns:
        `(B,)`.

    Raises:
        ValueError: For points outside of the readouts.
    """
    height, width = read.shape[-2:]
    outside = [p for pair in points for p in pair if not (0 <= p[0] < height and 0 <= p[1] < width)]
    if outside:
        raise ValueError(
            f"points {outside} lie outside of the readouts, which are {height} x {width} (H x W); points are (y, x) "
            "in their pixels, from 0."
        )
    place = torch.tensor(points, device=read.device)  # (P, 2 points, y and x)
    (y1, x1), (y2, x2) = place[:, 0].T, place[:, 1].T
    source = reference[:, :, y1, x1]
    moved = functional.cosine_similarity(source, read[:, :, y2, x2], dim=1).mean(1)
    stayed = functional.cosine_similarity(source, read[:, :, y1, x1], dim=1).mean(1)
    return (stayed - moved) / 4  # (stayed + 1) / 2 / 2 - (moved + 1) / 2 / 2


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean((1, 2, 3))
    weights = weights.to(values.dtype).expand_as(values)
    return (weights * values).sum((1, 2, 3)) / weights.sum((1, 2, 3))


def _crop(maps: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    top, left, bottom, right = box
    if bottom > size[0] or right > size[1]:
        raise ValueError(
            f"Box {box} reaches outside of the readouts, which are {size[0]} x {size[1]} (H x W); a box is (top, "
            "left, bottom, right) in their pixels."
        )
    return functional.interpolate(maps[:, :, top:bottom, left:right], size, mode="bilinear")


__all__ = ["Box", "Point", "appearance_loss", "drag_loss", "resize_target", "span", "spatial_loss"]
