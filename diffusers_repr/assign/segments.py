"""Masks and boxes without labels: patches of an encoder or a denoiser's layer, in clusters (arXiv 2210.06462)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.assign.base import Assigner
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.encoders import ImageEncoder

NOTHING = 255  # what masks have outside of a box
MAX_CLASSES = 255  # ids of one byte, less the one of nothing

Batches = Callable[[], Iterator[Sequence[Any]]]


@dataclass(frozen=True)
class Boxes:
    """A box in every image that has one.

    Attributes:
        corners: `(N, 4)`, int64: x0, y0, x1, y1 in pixels, the last ones outside; zeros where there is no box.
        features: `(N, D)`, mean over the pixels of what is in it; zeros where there is no box.
        found: `(N,)`, whether there is one.
    """

    corners: Tensor
    features: Tensor
    found: Tensor

    def masks(self, classes: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels in the box have its class, those outside `NOTHING`: `(N, H, W)`, int64.

        Args:
            classes: Of each box, `(N,)`.
            size: (H, W).
        """
        y, x = torch.arange(size[0]).view(1, -1, 1), torch.arange(size[1]).view(1, 1, -1)
        x0, y0, x1, y1 = self.corners.view(-1, 4, 1, 1).unbind(1)
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & self.found.view(-1, 1, 1)
        return torch.where(inside, classes.view(-1, 1, 1), NOTHING)


class PatchFeatures:
    """Features of the pixels of images: those of an encoder's patches, interpolated.

    Args:
        encoder: Any, a denoiser's layer among them (`Encoder.from_denoiser`).
        size: (H, W) to which images are brought; the aspect ratio is not kept.
        upsample: Bilinear to the pixels, or, if False, of each pixel the patch it is in.
    """

    def __init__(self, encoder: ImageEncoder, size: tuple[int, int], upsample: bool = True) -> None:
        self.encoder, self.size, self.upsample = encoder, size, upsample

    def patches(self, images: Sequence[Any]) -> Tensor:
        """`(B * N, D)`, the patches of one image after another: what clusters are fitted on."""
        return self.encoder.encode_pixels(self._pixels(images)).tokens.flatten(0, 1).cpu()

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """`(B, D, H, W)`."""
        maps = self.encoder.encode_pixels(self._pixels(images)).as_map()
        options = {"mode": "bilinear", "align_corners": False} if self.upsample else {"mode": "nearest"}
        return functional.interpolate(maps, self.size, **options).cpu()

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        return to_pixels(images, self.encoder.channels, self.size)


def fit_segments(
    features: PatchFeatures,
    batches: Batches,
    assigner: Assigner,
    most: int = 100_000,
    generator: torch.Generator | None = None,
) -> Assigner:
    """Fit the clusters of patches.

    Args:
        features: Of the images.
        batches: Gives all the images anew at each call.
        assigner: One that gives classes, such as k-means.
        most: Patches that it is fitted on, drawn from all with equal chances.
        generator: Of the draw and the fit; seed 0 if None.

    Raises:
        ValueError: For an assigner that gives no classes, or more than a mask can hold; fewer patches than clusters.
    """
    _check_classes(assigner)
    generator = generator or torch.Generator().manual_seed(0)
    kept, keys = torch.empty(0), torch.empty(0)
    for images in batches():
        found = features.patches(images)
        kept = torch.cat([kept, found]) if len(kept) else found
        keys = torch.cat([keys, torch.rand(len(found), generator=generator)])
        if len(kept) > most:  # those with the least of random keys are a draw without replacement
            chosen = keys.topk(most, largest=False, sorted=False).indices.sort().values
            kept, keys = kept[chosen], keys[chosen]
    assigner.fit(kept, generator)
    return assigner


def segment_pixels(pixels: Tensor, assigner: Assigner) -> Tensor:
    """The cluster of every pixel, `(B, H, W)`, int64, of features `(B, D, H, W)`."""
    batch, _, height, width = pixels.shape
    return assigner.assign(pixels.permute(0, 2, 3, 1).flatten(0, 2)).view(batch, height, width).cpu()


def background_classes(segments: Tensor, classes: int) -> Tensor:
    """Which classes are background: of their pixels a larger share lies on the border than of all pixels.

    Args:
        segments: Class ids of pixels, `(N, H, W)`, of many images.
        classes: Number of them.

    Returns:
        `(classes,)`, boolean; a class without pixels is none.

    Example:
        >>> background_classes(torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]]), 2)
        tensor([ True, False])
    """
    edge = torch.ones(segments.shape[1:], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    at_border = torch.bincount(segments[:, edge].flatten(), minlength=classes).double()
    of_all = torch.bincount(segments.flatten(), minlength=classes).double()
    return at_border / of_all.clamp(min=1) > edge.double().mean()


def find_boxes(segments: Tensor, background: Tensor, pixels: Tensor, least: float = 0.02) -> Boxes:
    """The box around the largest connected region of what is not background.

    Args:
        segments: Class ids `(B, H, W)`.
        background: Whether a class is background, `(classes,)`.
        pixels: Features `(B, D, H, W)`, whose mean over the region is that of the box.
        least: Share of the image that a region has at least; of smaller ones there is no box.
    """
    corners = torch.zeros(len(segments), 4, dtype=torch.long)
    features = torch.zeros(len(segments), pixels.shape[1])
    found = torch.zeros(len(segments), dtype=torch.bool)
    for at, mask in enumerate(~background[segments.long()]):
        region = torch.from_numpy(largest_region(mask.numpy()))
        if region.sum() < max(1.0, least * region.numel()):
            continue
        rows, columns = region.any(1).nonzero().flatten(), region.any(0).nonzero().flatten()
        corners[at] = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        features[at], found[at] = pixels[at, :, region].float().mean(1), True
    return Boxes(corners, features, found)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask `(H, W)`, corners count as touching; the first of equals.

    Example:
        >>> largest_region(np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=bool)).astype(int).tolist()
        [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    """
    from scipy.ndimage import label

    regions, _ = label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return (regions == sizes.argmax()) & mask


def _check_classes(assigner: Assigner) -> None:
    if assigner.gives != "class":
        raise ValueError(f"Segments are classes of pixels; a {type(assigner).__name__} gives {assigner.gives}.")
    count = int(assigner.null)  # the id beyond the classes
    if count > MAX_CLASSES:
        raise ValueError(f"A mask holds {MAX_CLASSES} classes; the {type(assigner).__name__} has {count}.")


__all__ = [
    "MAX_CLASSES",
    "NOTHING",
    "Boxes",
    "PatchFeatures",
    "background_classes",
    "find_boxes",
    "fit_segments",
    "largest_region",
    "segment_pixels",
]
