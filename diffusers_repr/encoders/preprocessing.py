"""Pixels of the library, in [-1, 1], to what a vision network takes: on tensors, on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.hub.schema import anything, boolean, either, integer, listing, number, optional, record

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Statistics:
    """What pixels in [0, 1] are standardised by.

    Attributes:
        mean: One number a channel.
        std: One number a channel, not 0.
        side: Side of the square images that the network was made for, where its image processor tells it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None = None


_PLANES = either(number(-1e6, 1e6), listing(number(-1e6, 1e6), 1, 64))
_SPREAD = either(number(1e-6, 1e6), listing(number(1e-6, 1e6), 1, 64))
_EDGE = integer(1, 2048)  # every image is resized to it: as many tokens as a network is read with
_SIZE = either(
    _EDGE,
    record({}, {name: optional(_EDGE) for name in ("height", "width", "shortest_edge", "longest_edge")}, others=True),
)
_PROCESSOR = record(
    {},
    {
        "image_mean": optional(_PLANES),
        "image_std": optional(_SPREAD),
        "do_normalize": optional(boolean()),
        "do_rescale": optional(boolean()),
        "do_center_crop": optional(boolean()),
        "rescale_factor": number(1e-12, 1e12),
        "size": optional(_SIZE),
        "crop_size": optional(_SIZE),
    },
    others=True,
)


def check_processor(config: Any, at: str) -> dict[str, Any]:
    """What is read of an image processor's file (`preprocessor_config.json`), checked; null as if it were not there.

    Raises:
        ValueError: With the field.

    Example:
        >>> check_processor({"image_mean": [0.5], "size": {"height": 10**9}}, "preprocessor_config.json")
        Traceback (most recent call last):
        ...
        ValueError: preprocessor_config.json: size.height is 1000000000; allowed is a whole number from 1 to 2048.
    """
    inner = record({}, {"image_processor": anything()}, others=True)(config, at).get("image_processor")
    found = _PROCESSOR(config if inner is None else inner, at)
    return {name: value for name, value in found.items() if value is not None}


def statistics_from_processor(config: Mapping[str, Any], default: Statistics) -> Statistics:
    """Read `preprocessor_config.json` of transformers; what it does not tell is that of `default`.

    Raises:
        ValueError: For a std of 0.
    """
    mean, std = config.get("image_mean", default.mean), config.get("image_std", default.std)
    mean, std = ([value] if isinstance(value, (int, float)) else value for value in (mean, std))
    if config.get("do_normalize") is False:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    # It multiplies 0..255 by the factor; pixels here are 0..1.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    if 0 in std:
        raise ValueError(f"The image processor has image_std {list(std)}; it must not hold 0.")
    return Statistics(tuple(m / scale for m in mean), tuple(s / scale for s in std), _side(config) or default.side)


def chosen_statistics(
    found: Statistics, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Statistics:
    """Statistics with those that the caller gives instead of those of the files.

    Args:
        found: Of the files.
        mean: Of pixels in [0, 1], one number or one a channel; None keeps that of the files.
        std: As `mean`.

    Raises:
        ValueError: For a std that is not above 0.

    Example:
        >>> chosen_statistics(Statistics(HALF, HALF), 0.25, None).mean
        (0.25,)
    """
    given = {
        name: tuple(map(float, [value] if isinstance(value, (int, float)) else value))
        for name, value in (("mean", mean), ("std", std))
        if value is not None
    }
    if not all(spread > 0 for spread in given.get("std", ())):
        raise ValueError(f"std must be above 0; got {std!r}.")
    return replace(found, **given)  # type: ignore[arg-type]


def check_planes(statistics: Statistics, channels: int) -> None:
    """Refuse statistics of another number of channels than the network takes.

    Raises:
        ValueError: With both numbers.
    """
    if {len(statistics.mean), len(statistics.std)} - {1, channels}:
        raise ValueError(
            f"The encoder takes {channels} channels, and its image statistics have {len(statistics.mean)} means "
            f"and {len(statistics.std)} standard deviations; pass mean= and std= (0.5 and 0.5 for pixels in [-1, 1]), "
            f"or write image_mean and image_std of {channels} into a preprocessor_config.json beside its weights."
        )


def _side(config: Mapping[str, Any]) -> int | None:
    for key in ("crop_size", "size"):
        size = config.get(key)
        if key == "crop_size" and config.get("do_center_crop") is False:
            continue
        if isinstance(size, int):
            return size
        if isinstance(size, Mapping) and size.get("height") and size.get("height") == size.get("width"):
            return int(size["height"])
    return None


def expand_channels(pixels: Tensor, channels: int) -> Tensor:
    """Grey images `(B, 1, H, W)` to `channels` equal channels; others must have that many.

    Raises:
        ValueError: If the number of channels does not fit.
    """
    if pixels.shape[1] == channels:
        return pixels
    if pixels.shape[1] != 1:
        raise ValueError(
            f"Pixels have {pixels.shape[1]} channels in shape {tuple(pixels.shape)}; the encoder takes {channels}"
            + (" (or 1, which is repeated)." if channels > 1 else ": pass grey images.")
        )
    return pixels.expand(-1, channels, -1, -1)


def preprocess(pixels: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize and standardise, in float32.

    The resize is bicubic without antialiasing, as REPA's (arXiv 2410.06940); it comes first, which is the same as
    after the standardisation, because the weights of the filter add up to 1.

    Args:
        pixels: `(B, C, H, W)` in [-1, 1].
        size: (H, W) to resize to.
        mean: One number, or one a channel, of pixels in [0, 1].
        std: As `mean`.

    Example:
        >>> preprocess(torch.ones(1, 1, 4, 4), (2, 2), [0.5], [0.25]).flatten().tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    pixels = pixels.float() / 2 + 0.5
    if tuple(pixels.shape[2:]) != tuple(size):
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
    shift, scale = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1).to(pixels.device) for v in (mean, std))
    return (pixels - shift) / scale
