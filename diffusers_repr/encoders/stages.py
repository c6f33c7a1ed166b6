"""Stages of a network that grows coarser as it goes: where its maps are read, their channels and strides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.encoders.source import device_of


@dataclass(frozen=True)
class Stage:
    """One resolution of a backbone.

    Attributes:
        path: Full path of the module that gives its map `(B, C, h, w)` or tokens `(B, h * w, C)`.
        channels: C.
        stride: Pixels of an image a cell, along a side.
    """

    path: str
    channels: int
    stride: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the map of images (H, W) whose sides are multiples of the stride."""
        return size[0] // self.stride, size[1] // self.stride

    def as_map(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """What the module gave for images (H, W), as `(B, C, h, w)`."""
        return value if value.ndim == 4 else FeatureMap(value, self.grid(size)).as_map()


def measure_stages(model: nn.Module, paths: Sequence[str], channels: int, size: tuple[int, int]) -> list[Stage]:
    """Stages of any network whose modules at `paths` give maps, by one forward of a grey image.

    Args:
        model: Takes `(B, C, H, W)`.
        paths: Full module paths, in any order.
        channels: C.
        size: (H, W).

    Raises:
        ValueError: For a module that does not exist, does not run, or gives no map of a whole stride.
    """
    grey = torch.zeros(2, channels, *size, device=device_of(model), dtype=floating_dtype(model))
    with torch.no_grad(), eval_mode(model), capture(model, list(paths), stop_early=False) as tape:
        model(grey)
    found = []
    for path in paths:
        shape = tuple(tape[path].shape)
        stride = size[0] // shape[2] if len(shape) == 4 else 0
        if not stride or (shape[2] * stride, shape[3] * stride) != size:
            raise ValueError(
                f"{path!r} of {type(model).__name__} gave {shape} for images of {size[0]} x {size[1]}; a stage gives "
                "a map (B, C, h, w) with h and w a whole number of times smaller. Name other modules, or take images "
                "whose sides the strides divide."
            )
        found.append(Stage(path, shape[1], stride))
    return found


def stage_paths(model: nn.Module) -> list[str]:
    """Modules that a network itself calls its stages: the elements of its list `stages`.

    Raises:
        TypeError: If it has none.
    """
    stages = getattr(model, "stages", None)
    if not isinstance(stages, (nn.ModuleList, nn.Sequential)) or not len(stages):
        raise TypeError(
            f"{type(model).__name__} has no list `stages` of modules; name the modules that give its maps "
            '(`stages=["layer1", "layer2"]`), or take a ResNet, ConvNeXt or Swin of transformers.'
        )
    return [f"stages.{at}" for at in range(len(stages))]


def resnet_stages(config: Mapping[str, Any]) -> list[Stage]:
    """Of transformers' ResNet: the stem's stride is 4, and each stage but the first halves the sides."""
    first = 8 if config["downsample_in_first_stage"] else 4
    return [Stage(f"encoder.stages.{at}", width, first << at) for at, width in enumerate(config["hidden_sizes"])]


def convnext_stages(config: Mapping[str, Any]) -> list[Stage]:
    """Of transformers' ConvNeXt and ConvNeXt V2: patches, halved by each stage but the first."""
    patch = config["patch_size"]
    return [Stage(f"encoder.stages.{at}", width, patch << at) for at, width in enumerate(config["hidden_sizes"])]


def swin_stages(config: Mapping[str, Any]) -> list[Stage]:
    """Of transformers' Swin: the last block of each, before patches are merged."""
    patch, width = config["patch_size"], config["embed_dim"]
    return [
        Stage(f"encoder.layers.{at}.blocks.{depth - 1}", width << at, patch << at)
        for at, depth in enumerate(config["depths"])
    ]


__all__ = [
    "Stage",
    "convnext_stages",
    "measure_stages",
    "resnet_stages",
    "stage_paths",
    "swin_stages",
]
