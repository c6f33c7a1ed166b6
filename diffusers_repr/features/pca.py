"""Feature maps as pictures: the first three principal components of a layer as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.pictures.figure import require_matplotlib

_ENDS = (0.01, 0.99)  # quantiles of a component that become black and full colour: single cells do not dim the rest


def pca_rgb(maps: Tensor) -> Tensor:
    """The first three principal components of the cells of maps, as colours.

    The components are those of all images together, so that equal colours mean like features. Each component's sign is
    the one for which its loading of largest size is positive.

    Args:
        maps: `(B, C, h, w)`, C >= 3.

    Returns:
        `(B, h, w, 3)` in [0, 1], float32: of each component the range between its quantiles 0.01 and 0.99.

    Raises:
        ValueError: For another shape, or fewer than three channels or cells.

    Example:
        >>> pca_rgb(torch.rand(2, 8, 4, 6)).shape
        torch.Size([2, 4, 6, 3])
    """
    if maps.ndim != 4:
        raise ValueError(f"Principal components as colours need maps (B, C, h, w); got {tuple(maps.shape)}.")
    cells = maps.detach().cpu().double().movedim(1, -1)
    shape, cells = cells.shape[:-1], cells.flatten(0, -2)
    if min(cells.shape) < 3:
        raise ValueError(f"{cells.shape[0]} cells of {cells.shape[1]} channels have no three principal components.")
    cells = cells - cells.mean(0)
    axes = torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -3:].flip(1)  # eigenvalues rise
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    found = cells @ (axes * largest.sign())
    low, high = (torch.quantile(found, end, dim=0) for end in _ENDS)
    flat = high - low <= 1e-12 * cells.abs().max()
    colours = torch.where(flat, 0.5, (found - low) / (high - low).masked_fill(flat, 1)).clamp(0, 1)
    return colours.float().unflatten(0, shape)


def draw_pca(maps: Sequence[Tensor], images: Any, layer: str, levels: Sequence[str], limit: int) -> Any:
    """A figure: each image with the components of its features beside it, a column for each level.

    Args:
        maps: `(B, C, h, w)` of each level.
        images: To show beside, as `to_pixels` takes them, but of any sizes.
        layer: Its name.
        levels: Names of the levels.
        limit: The first images that are shown; the components are those of all.

    Raises:
        ValueError: If there are not as many images as maps.
        ImportError: If matplotlib is missing.
    """
    count, given = len(maps[0]), _each(images)
    if len(given) != count:
        raise ValueError(f"{len(given)} images for the features of {count}; pass those that were extracted.")
    rows, columns = min(limit, count), 1 + len(maps)
    shown = [(to_pixels(image, 3)[0].movedim(0, -1).cpu().numpy() + 1) / 2 for image in given[:rows]]
    tall = [min(image.shape[0] / image.shape[1], 3) for image in shown]
    size = 2.5 * columns, 0.6 + sum(2.4 * height + 0.1 for height in tall)
    picture = require_matplotlib().Figure(figsize=size, layout="compressed", dpi=min(140, 30_000 / max(size)))
    axes = picture.subplots(rows, columns, squeeze=False, height_ratios=tall)
    for at, colours in enumerate(map(pca_rgb, maps)):
        for row, image in enumerate(shown):
            height, width = image.shape[:2]
            # Over the extent of the image: a cell lies where it saw, and the aspect ratio is the image's.
            axes[row][1 + at].imshow(colours[row].numpy(), extent=(0, width, height, 0), interpolation="nearest")
        axes[0][1 + at].set_title(levels[at], fontsize=9)
    for row, image in enumerate(shown):
        axes[row][0].imshow(image, interpolation="nearest")
    axes[0][0].set_title("image", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    some = "" if rows == count else f" ({rows} of {count} images)"
    picture.suptitle(f"{layer}: principal components 1, 2, 3 as red, green, blue{some}", fontsize=10)
    return picture


def _each(images: Any) -> list[Any]:
    """One by one, as `to_pixels` would take them together."""
    if isinstance(images, Image.Image) or getattr(images, "ndim", 4) < 4:
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images)
    return [part for image in images for part in _each(image)]


__all__ = ["draw_pca", "pca_rgb"]
