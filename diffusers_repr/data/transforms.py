"""From an image of any size and mode to pixels of one size, and the augmentation of a batch of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from diffusers_repr.data.placement import CROPS, Crop, adm_sizes, on_image
from diffusers_repr.denoiser.images import as_mode


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM and DDPM (arXiv 2105.05233), on which FID statistics of ImageNet are computed.

    Halved by a box filter while the shorter side is at least twice `size`, then brought to `size` on the shorter
    side by a bicubic filter, then cropped at the centre (an odd remainder leaves its pixel right and below).

    Args:
        image: Mode `L` or `RGB`.
        size: Side of the square, pixels.

    Example:
        >>> adm_center_crop(Image.new("RGB", (101, 67)), 32).size
        (32, 32)
    """
    *halves, last = adm_sizes(image.size, size)
    for half in halves:
        image = image.resize(half, Image.Resampling.BOX)
    image = image.resize(last, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fit_center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred crop of the aspect ratio of `size` (H, W), scaled by a Lanczos filter."""
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_uint8(image: Image.Image, channels: int, size: tuple[int, int], crop: Crop) -> Tensor:
    """uint8 `(channels, H, W)` of an image after its centre crop.

    Args:
        image: Any mode that `as_mode` takes.
        channels: 1 or 3.
        size: (H, W).
        crop: `adm` (square sizes only) or `fit`.

    Raises:
        ValueError: As `as_mode`; for `adm` with unequal sides.
    """
    check_crop(crop, size)
    image = as_mode(image, channels)
    image = adm_center_crop(image, size[0]) if crop == "adm" else fit_center_crop(image, size)
    return torch.from_numpy(np.array(image)).view(size[0], size[1], -1).permute(2, 0, 1).contiguous()


def check_crop(crop: str, size: tuple[int, int]) -> None:
    """Refuse a crop that is unknown, or that cannot give this size.

    Raises:
        ValueError: If so.
    """
    if crop not in CROPS:
        raise ValueError(f"center_crop={crop!r}; allowed are {', '.join(CROPS)}.")
    if min(size) < 1:
        raise ValueError(f"Images of size {size} (H, W) have no pixel.")
    if crop == "adm" and size[0] != size[1]:
        raise ValueError(f"center_crop='adm' gives squares, the size is {size} (H, W); use center_crop='fit'.")


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def draw_flips(batch: int, device: torch.device | str) -> Tensor:
    """Which of `(batch,)` images are mirrored: `torch.rand(batch) < 0.5`, from the device's global generator."""
    return torch.rand(batch, device=device) < 0.5


@dataclass(frozen=True)
class Moves:
    """What the augmentation does to each of B images, drawn once for images, masks and points.

    Attributes:
        mirrored: `(B,)` which are mirrored; None: none.
        affine: `(B, 2, 3)` from places of the result to places of the mirrored image, as `affine_grid` takes them
            (the sides span [-1, 1]); None: they stay.
    """

    mirrored: Tensor | None = None
    affine: Tensor | None = None

    @classmethod
    def draw(
        cls, batch: int, device: torch.device | str, flip: bool, rotation: float, shift: float, scale: float
    ) -> Moves:
        """Draws from the device's global generator; settings and their order as `augment` tells."""
        mirrored = draw_flips(batch, device) if flip else None
        if not (rotation or shift or scale):
            return cls(mirrored)
        # Rows 0 to 3 are used; five are drawn so that numbers recorded from runs without mirroring stay what they are.
        angle, across, down, zoom, _ = torch.rand(5, batch, device=device) * 2 - 1
        angle, zoom = angle * math.radians(rotation), 1 + zoom * scale
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        # affine_grid's coordinates span [-1, 1]: a share of the side is twice that share
        rows = [cos, -sin, 2 * shift * across, sin, cos, 2 * shift * down]
        return cls(mirrored, torch.stack(rows, dim=1).view(-1, 2, 3))

    def images(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1], moved by a bilinear filter; what enters is black."""
        images = self._mirror(images)
        return images if self.affine is None else _sample(images + 1, self.affine, "bilinear") - 1

    def masks(self, masks: Tensor, ignore_index: int) -> Tensor:
        """(B, H, W) class ids, moved to the nearest pixel; what enters is ignored."""
        masks = self._mirror(masks)
        if self.affine is None:
            return masks
        away = (masks - ignore_index).float()[:, None]  # what enters is zero; float32 holds ids up to 2**24
        return _sample(away, self.affine, "nearest")[:, 0].to(masks.dtype) + ignore_index

    def points(self, points: Tensor, visible: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, P, 2) as (x, y) on images of `size` (H, W), and (B, P) which are visible: none off the image."""
        side = points.new_tensor([size[1], size[0]])
        if self.mirrored is not None:
            flipped = torch.stack([side[0] - 1 - points[..., 0], points[..., 1]], dim=-1)
            points = torch.where(self.mirrored.view(-1, 1, 1), flipped, points)
        if self.affine is not None:
            away = (2 * points + 1) / side - 1 - self.affine[:, None, :, 2].to(points.dtype)
            unit = torch.linalg.solve(self.affine[:, :, :2].to(points.dtype), away.mT).mT
            points = ((unit + 1) * side - 1) / 2
        return points, visible & on_image(points, size)

    def _mirror(self, values: Tensor) -> Tensor:
        if self.mirrored is None:
            return values
        return torch.where(self.mirrored.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)


def _sample(values: Tensor, affine: Tensor, mode: str) -> Tensor:
    grid = F.affine_grid(affine, list(values.shape), align_corners=False)
    return F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)


def augment(images: Tensor, flip: bool, rotation: float, shift: float, scale: float) -> Tensor:
    """Mirror, turn, move and scale each of (B, C, H, W) in [-1, 1] by its own draw; what enters is black.

    The draws come from the device's global generator in this order: with `flip`, `draw_flips(B)`; with any of the
    others, `torch.rand(5, B)`. A run from a cache, which mirrors only, so draws the same numbers.

    Args:
        images: In [-1, 1].
        flip: Mirror half of them, exactly.
        rotation: Degrees; uniform up to it, either way.
        shift: Share of the side; uniform up to it, either way.
        scale: Share by which the zoom departs from 1; uniform up to it, either way.
    """
    return Moves.draw(len(images), images.device, flip, rotation, shift, scale).images(images)


def move_annotations(
    batch: Mapping[str, Any], moves: Moves, size: tuple[int, int], ignore_index: int
) -> dict[str, Any]:
    """The `masks`, int64, and the `points` and `visible` of a batch of images of `size` (H, W), moved with them."""
    moved: dict[str, Any] = {}
    if "masks" in batch:
        moved["masks"] = moves.masks(batch["masks"].long(), ignore_index)
    if "points" in batch:
        moved["points"], moved["visible"] = moves.points(batch["points"], batch["visible"], size)
    return moved
