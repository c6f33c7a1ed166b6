"""Videos in, pixels out: lists of frames, numpy arrays and tensors to one float32 tensor in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.denoiser.images import to_pixels


def to_video_pixels(videos: Any, channels: int = 3, image_size: int | tuple[int, int] | None = None) -> Tensor:
    """Bring videos to `(B, channels, frames, H, W)` float32 in [-1, 1]; an image is a video of one frame.

    Args:
        videos: A sequence of videos, each a list of frames, a numpy array `(frames, H, W, C)` or a tensor
            `(frames, C, H, W)`; all videos as one array or tensor with five dimensions; or images as `to_pixels`
            takes them. A list of PIL images, and an array or tensor with four dimensions, is a batch of images;
            `[frames]` is a video of them.
        channels: As in `to_pixels`.
        image_size: As in `to_pixels`.

    Raises:
        ValueError: For videos of unequal length or size, or without frames; as `to_pixels`.
        TypeError: For what is neither an image nor a video.

    Example:
        >>> to_video_pixels(torch.rand(2, 5, 3, 8, 8)).shape, to_video_pixels(torch.rand(2, 3, 8, 8)).shape
        (torch.Size([2, 3, 5, 8, 8]), torch.Size([2, 3, 1, 8, 8]))
    """
    if isinstance(videos, (np.ndarray, Tensor)) and videos.ndim == 5:
        videos = list(videos)
    several = isinstance(videos, Sequence) and not isinstance(videos, (str, bytes)) and len(videos) > 0
    if not several or not all(_is_video(video) for video in videos):
        return to_pixels(videos, channels, image_size).unsqueeze(2)
    frames = [to_pixels(video, channels, image_size) for video in videos]
    shapes = sorted({(len(video), *video.shape[2:]) for video in frames})
    if len(shapes) > 1:
        raise ValueError(
            f"Videos of unequal (frames, H, W) {shapes}: cut them to one length and pass `image_size=(H, W)` to "
            "resize their frames, or pass one video at a time."
        )
    return torch.stack(frames).transpose(1, 2)


def _is_video(value: Any) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 4
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
