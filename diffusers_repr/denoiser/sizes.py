"""Which sizes of images and videos suit a network and its autoencoder, and how a size is asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

from diffusers_repr.hub.checks import check_whole

# (H, W), one side of a square, "keep" for the images' own size; None is the size the model was configured for.
ImageSize: TypeAlias = int | tuple[int, int] | Literal["keep"] | None


def image_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size in pixels that was asked for.

    Raises:
        ValueError: For anything but one side, or two, from 1.

    Example:
        >>> image_sides(32), image_sides([32, 48])
        ((32, 32), (32, 48))
    """
    values = (size, size) if isinstance(size, int) else tuple(size)
    if isinstance(size, str) or len(values) != 2:
        raise ValueError(
            f"image_size is one side, or (height, width), in pixels; 'keep' for the images' own size; or None for the "
            f"model's. Got {size!r}."
        )
    return check_whole("image_size", values[0]), check_whole("image_size", values[1])


def check_size(
    name: str, size: tuple[int, ...], *, axes: int, multiple: int, frame_stride: int = 1, square: bool = False
) -> None:
    """Raise ValueError unless images, or videos, of a size suit.

    Args:
        name: Of the network's class, for messages.
        size: (H, W), or (frames, H, W), in pixels.
        axes: 2 for a network of images; 3 for one of videos, which takes images too.
        multiple: What H and W must be multiples of.
        frame_stride: Frames of a video per frame of x_0, behind the first.
        square: Whether only H = W is right.

    Example:
        >>> check_size("Net", (8, 16, 16), axes=3, multiple=8, frame_stride=4)
        Traceback (most recent call last):
        ...
        ValueError: Videos have 8 frames; Net takes 4 k + 1, such as 9: one, and one for each 4 after it.
    """
    if not 2 <= len(size) <= axes:
        what = "images of a size (H, W)" + (", or videos of (frames, H, W)" if axes == 3 else "")
        raise ValueError(f"{name} takes {what}; got {tuple(size)}.")
    *frames, h, w = size
    if frames and (frames[0] < 1 or (frames[0] - 1) % frame_stride):
        near = max(0, round((frames[0] - 1) / frame_stride)) * frame_stride + 1
        raise ValueError(
            f"Videos have {frames[0]} frames; {name} takes {frame_stride} k + 1, such as {near}: one, and one for "
            f"each {frame_stride} after it."
        )
    if h % multiple or w % multiple:
        good = tuple(max(multiple, round(v / multiple) * multiple) for v in (h, w))
        raise ValueError(
            f"Images are {h} x {w} (H x W); {name} takes multiples of {multiple}. Pass image_size={good} to resize."
        )
    if square and h != w:
        raise ValueError(
            f"{name} takes square images only (its forward assumes a square token grid); got {h} x {w}. Crop, or pass "
            f"image_size={min(h, w)}."
        )


def asked_latent_size(
    height: int | None, width: int | None, own: tuple[int, ...], stride: int, patch: int, *, given: bool = False
) -> tuple[int, ...]:
    """(h, w) of x_0 for images whose size a pipeline is asked for.

    Args:
        height: In pixels; None for the own one.
        width: As `height`.
        own: (h, w) of the latents that were given, or else of those of training.
        stride: Pixels a place of x_0.
        patch: Places of x_0 a token.
        given: Whether latents were given, which say the size.

    Raises:
        TypeError, ValueError: For what is no size in whole patches, or not that of the latents.

    Example:
        >>> asked_latent_size(64, None, (4, 6), 8, 2)
        (8, 6)
    """
    size = []
    for name, pixels, places in zip(("height", "width"), (height, width), own, strict=True):
        pixels = places * stride if pixels is None else pixels
        if check_whole(name, pixels) % (stride * patch):
            raise ValueError(f"{name}={pixels} is no multiple of {stride * patch}, the pixels of a patch.")
        if given and pixels != places * stride:
            raise ValueError(f"{name}={pixels}, but the latents are for {places * stride}; leave {name} out.")
        size.append(pixels // stride)
    return tuple(size)


_FAR = 8  # times the pixels that a network was made for


def warn_if_far_larger(name: str, size: tuple[int, ...], own: tuple[int, int] | None) -> None:
    """Warn where images that keep their size are far larger than those a network was made for.

    Args:
        name: Of the network's class.
        size: (H, W) of the images, or (frames, H, W).
        own: (H, W) it was made for; None if that is not known.
    """
    if own is None or math.prod(size[-2:]) <= _FAR * math.prod(own):
        return
    times = math.prod(size[-2:]) / math.prod(own)
    warnings.warn(
        f"Images keep their size, {size[-2]} x {size[-1]} (image_size='keep'): {times:.3g} times the pixels of the "
        f"{own[0]} x {own[1]} that {name} was made for. A forward costs as many times more, or worse, and "
        "its features are far from its training. Leave image_size out to bring images to its own size.",
        stacklevel=3,
    )


__all__ = ["ImageSize", "asked_latent_size", "check_size", "image_sides", "warn_if_far_larger"]
