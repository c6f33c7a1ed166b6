"""Random views of images for contrastive objectives: all on tensors, each image by its own draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.data.base import TrainData, augmented, hashed
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.variants import read_variants


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How two views of an image differ, besides the flips, turns and shifts of `DataConfig`.

    Raises:
        ValueError: If a share or a factor is out of range.
    """

    crop_scale: float = setting(1.0, "least share of the area that a random crop keeps; 1: no crop")
    crop_ratio: float = setting(4 / 3, "most that a crop departs from the image's aspect ratio")
    jitter_probability: float = setting(0.0, "share of images whose colours are jittered")
    brightness: float = setting(0.4, "jitter: factor on the values, 1 give or take this")
    contrast: float = setting(0.4, "jitter: factor on the distance to the image's mean luma")
    saturation: float = setting(0.4, "jitter: factor on the distance to the pixel's luma (RGB only)")
    grey_probability: float = setting(0.0, "share of images that lose their colours (RGB only)")
    variants_dir: str | None = setting(None, "variants of each image, of `diffusers-repr generate`, to be views")
    variant_probability: float = setting(1.0, "share of the views that may be variants which are")
    variant_views: Literal["second", "both", "either"] = setting("second", "which views may be variants")

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1 <= self.crop_ratio:
            raise ValueError(
                f"`crop_scale` is a share of the area, above 0 and up to 1, and `crop_ratio` is 1 or more; got "
                f"{self.crop_scale} and {self.crop_ratio}."
            )
        shares = ("jitter_probability", "grey_probability", "brightness", "contrast", "saturation")
        for name in (*shares, "variant_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` lies in [0, 1]; got {getattr(self, name)}.")


def random_crop(images: Tensor, scale: float, ratio: float = 4 / 3) -> Tensor:
    """A random box of each of (B, C, H, W), resized to (H, W) by a bilinear filter.

    The box has a share of the area in [scale, 1] and an aspect ratio in [1 / ratio, ratio] of the image's, uniform
    and log-uniform, and lies anywhere inside.
    """
    if scale == 1:
        return images
    area, stretch, across, down = torch.rand(4, len(images), device=images.device)
    area, stretch = scale + (1 - scale) * area, math.log(ratio) * (2 * stretch - 1) / 2
    width, height = (area.sqrt() * (sign * stretch).exp() for sign in (1, -1))  # shares of the sides
    width, height = width.clamp(max=1), height.clamp(max=1)
    none = torch.zeros_like(width)
    rows = [width, none, (1 - width) * (2 * across - 1), none, height, (1 - height) * (2 * down - 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def luma(images: Tensor) -> Tensor:
    """(B, 1, H, W): the weighted sum of red, green and blue; grey images as they are."""
    weights = torch.tensor([1.0] if images.shape[1] == 1 else [0.299, 0.587, 0.114], device=images.device)
    return (images * weights.view(-1, 1, 1)).sum(1, keepdim=True)


def jitter(images: Tensor, config: ViewConfig) -> Tensor:
    """Brightness, contrast, saturation and loss of colour of (B, C, H, W) in [-1, 1]."""
    drawn = torch.rand(5, len(images), 1, 1, 1, device=images.device)
    pixels = images / 2 + 0.5
    if config.jitter_probability:
        strengths = [config.brightness, config.contrast, config.saturation]
        light, contrast, saturation = (1 + s * (2 * d - 1) for s, d in zip(strengths, drawn[:3], strict=True))
        changed = (pixels * light).clamp(0, 1)
        mean = luma(changed).mean((2, 3), keepdim=True)
        changed = (mean + contrast * (changed - mean)).clamp(0, 1)
        if pixels.shape[1] == 3:
            grey = luma(changed)
            changed = (grey + saturation * (changed - grey)).clamp(0, 1)
        pixels = torch.where(drawn[3] < config.jitter_probability, changed, pixels)
    if config.grey_probability:
        pixels = torch.where(drawn[4] < config.grey_probability, luma(pixels).expand_as(pixels), pixels)
    return 2 * pixels - 1


def view(images: Tensor, config: ViewConfig) -> Tensor:
    """One random view of each of (B, C, H, W) in [-1, 1]; draws from the global generator of their device."""
    images = random_crop(images, config.crop_scale, config.crop_ratio)
    return jitter(images, config) if config.jitter_probability or config.grey_probability else images


class ViewData(TrainData):
    """Two views of images that are decoded once and lie on the device as uint8; labels are not looked at.

    Args:
        data: The images.
        config: How views differ.

    Attributes:
        data: As given.
        config: As given.
        pixels: All images, uint8.

    Raises:
        ValueError: If grey images are to lose their colours.
    """

    def __init__(self, data: ImageTrainData, config: ViewConfig) -> None:
        self.data, self.config = data, config
        self.pixels = torch.stack([data[index]["pixel_values"] for index in range(len(data))])
        if self.pixels.shape[1] == 1 and config.grey_probability:
            raise ValueError("`grey_probability` takes colours away; these images are grey. Set it to 0.")
        self.variants = None if config.variants_dir is None else read_variants(config.variants_dir, self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": torch.tensor(index)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What joining `self[i]` for each of `indices` gives."""
        return {"index": torch.tensor(list(indices))}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`views` (2, B, C, H, W) in [-1, 1]."""
        self.pixels = self.pixels.to(batch["index"].device)
        twice = {"pixel_values": self._sources(batch["index"])}
        views = view(augmented(twice, self.data.config)["pixel_values"], self.config)
        return {**batch, "views": views.unflatten(0, (2, -1))}

    def _sources(self, rows: Tensor) -> Tensor:
        """What both views are made of, `(2B, C, H, W)`: the images, or variants of them (arXiv 2403.05966)."""
        images, share, which = self.pixels[rows], self.config.variant_probability, self.config.variant_views
        if self.variants is None or share == 0:  # nothing is drawn: all else is as without variants
            return images.repeat(2, 1, 1, 1)
        self.variants = self.variants.to(rows.device)
        found = [images, images]
        either = torch.rand(len(rows), device=rows.device) < 0.5 if which == "either" else None
        for place in (0, 1):
            if which == "second" and place == 0:
                continue
            drawn = torch.randint(self.variants.shape[1], (len(rows),), device=rows.device)
            taken = torch.rand(len(rows), device=rows.device) < share
            if either is not None:
                taken &= either if place else ~either
            found[place] = torch.where(taken.view(-1, 1, 1, 1), self.variants[rows, drawn], images)
        return torch.cat(found)

    def labelled(self) -> tuple[Tensor, Tensor]:
        """All images, uint8, and their class ids."""
        return self.pixels, torch.tensor([int(self.data.annotations(row)["class_labels"]) for row in range(len(self))])

    def fingerprint(self) -> dict[str, Any]:
        """That of the images, and of their variants."""
        own = self.data.fingerprint()
        if self.variants is not None:
            own["variants"] = hashed(part.numpy().tobytes() for part in self.variants.cpu())
        return own

    @property
    def class_names(self) -> None:
        """None: there are no labels."""
        return None

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of pixels in [0, 1]."""
        std, mean = torch.std_mean(self.pixels.double() / 255, (0, 2, 3))
        return mean.tolist(), std.tolist()
