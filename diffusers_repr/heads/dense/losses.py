"""Losses that train readout heads, and edges computed from images as labels; pure functions, float32 or wider."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 0.07


def sobel_edges(images: Tensor, gain: float = 2.0) -> Tensor:
    """Edge strength of images, a label that needs no annotator.

    The largest over the channels of the Sobel gradient's length, 1 being a step from black to white, times `gain`,
    mapped from [0, 1] to [-1, 1]; what is longer is clipped. Borders are replicated.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        gain: 2 gives the largest label to a step of half the range, since photographs have few stronger ones.

    Returns:
        `(B, 1, H, W)` in [-1, 1], -1 where the image is flat.

    Example:
        >>> sobel_edges(torch.ones(1, 3, 4, 4)).unique()
        tensor([-1.])
    """
    x = (images if images.dtype == torch.float64 else images.float()).flatten(0, 1)[:, None]
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device)
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None] / 8
    gradient = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernels)
    length = torch.linalg.vector_norm(gradient, dim=1).unflatten(0, images.shape[:2])
    return (2 * gain * length.amax(1, keepdim=True) - 1).clamp(-1, 1)


def sample_points(maps: Tensor, points: Tensor, size: tuple[float, float]) -> Tensor:
    """Features at points, bilinear between the centres of cells.

    Args:
        maps: `(B, C, h, w)`.
        points: `(B, P, 2)` as (y, x) in pixels of an image of `size`, the centre of its first pixel being (0, 0).
        size: (H, W) of that image.

    Returns:
        `(B, P, C)`.

    Raises:
        ValueError: If shapes do not fit.
    """
    if points.ndim != 3 or points.shape[0] != maps.shape[0] or points.shape[2] != 2:
        raise ValueError(f"points must be ({maps.shape[0]}, P, 2) as (y, x); got {tuple(points.shape)}.")
    sides = torch.tensor(size, dtype=maps.dtype, device=maps.device)
    place = (2 * points.to(maps.device, maps.dtype) + 1) / sides - 1  # of [-1, 1], the outer edges of the image
    found = functional.grid_sample(maps, place.flip(-1)[:, :, None], padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


def appearance_triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over samples and places of `max(0, cos(anchor, negative) - cos(anchor, positive) + margin)`.

    Args:
        anchor: Readout of an image, `(B, C, H, W)`.
        positive: Of another view of the same subject, same shape.
        negative: Of an image of another look, same shape.
        margin: By how much the positive must be closer, in cosine; 0.5 as in Readout Guidance.

    Raises:
        ValueError: If the shapes differ.
    """
    if not anchor.shape == positive.shape == negative.shape:
        shapes = [tuple(x.shape) for x in (anchor, positive, negative)]
        raise ValueError(f"anchor, positive and negative must have one shape; got {shapes}.")
    anchor, positive, negative = (x if x.dtype == torch.float64 else x.float() for x in (anchor, positive, negative))
    near = functional.cosine_similarity(anchor, positive, dim=1)
    far = functional.cosine_similarity(anchor, negative, dim=1)
    return functional.relu(far - near + margin).mean()


def correspondence_loss(first: Tensor, second: Tensor, valid: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy of matching points by `cosine / 0.07` among the points of the same pair of images.

    Args:
        first: Features at points of the first images, `(B, P, C)`; `sample_points` gives them.
        second: At the corresponding points of the second images.
        valid: `(B, P)` bool; points that are out of sight in one of the two are neither queries nor candidates.

    Returns:
        The mean over valid points of both directions; 0 if none is valid.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"Both must be (B, P, C) alike; got {tuple(first.shape)} and {tuple(second.shape)}.")
    if valid is None:
        valid = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    first, second = (x if x.dtype == torch.float64 else x.float() for x in (first, second))
    scores = functional.normalize(first, dim=2) @ functional.normalize(second, dim=2).transpose(1, 2) / _TEMPERATURE
    scores = scores.masked_fill(~(valid[:, :, None] & valid[:, None]), -math.inf)
    scores = scores.masked_fill(
        ~valid[:, :, None] & torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device), 0
    )
    own = scores.diagonal(dim1=1, dim2=2)
    losses = (scores.logsumexp(2) + scores.logsumexp(1)) / 2 - own
    return (losses * valid).sum() / valid.sum().clamp(min=1)


__all__ = ["appearance_triplet_loss", "correspondence_loss", "sample_points", "sobel_edges"]
