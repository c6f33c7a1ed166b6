"""Masks of the first frame of a video carried to the others by features: DIFT's protocol on DAVIS."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.data.davis import MaskedVideo
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.video_masks import VideoScores, video_scores
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.matches import as_pil

_BLOCK = 16  # cells on a side of the targets that are matched together
_SHORT, _MULTIPLE = 480, 32


@dataclass(frozen=True)
class PropagationConfig:
    """How labels are carried on.

    Attributes:
        temperature: Of the weights `exp(cosine / temperature)`.
        top_k: Context cells that a cell takes labels from, the most alike ones.
        context: Frames before, besides the first.
        radius: A cell looks no further than so many cells right, left, up and down; None: everywhere.

    Raises:
        ValueError: For a temperature that is not above 0, or counts below 1.
    """

    temperature: float = 0.2
    top_k: int = 15
    context: int = 28
    radius: int | None = 15

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature!r}.")
        check_whole("top_k", self.top_k)
        check_whole("context", self.context)
        if self.radius is not None:
            check_whole("radius", self.radius)


# Of the README of DIFT's code, by the architectures of `presets("dift-davis", ...)`.
DAVIS_SETTINGS = {"sd": PropagationConfig(0.2, 15, 28, 15), "adm-256": PropagationConfig(0.1, 10, 28, 15)}


def propagate_labels(
    maps: Iterable[Tensor], first: Tensor, config: PropagationConfig = DAVIS_SETTINGS["sd"]
) -> Iterator[Tensor]:
    """Soft labels of every frame but the first.

    Of a cell of the new frame and the cells of the first frame and of the last `context` ones: weights
    `exp(cosine / T)` in a square window, the `top_k` largest of all context (and what equals the smallest of them),
    brought to sum 1, times the labels there. What is found joins the context, as it is.

    The window is cut out of the context block by block, so that most of the products that the reference makes and
    then masks are never made.

    Args:
        maps: `(C, h, w)` of each frame, in order.
        first: `(K, h, w)`, labels of the first frame: one-hot.
        config: See `DAVIS_SETTINGS`.

    Yields:
        `(K, h, w)` float32, each cell with sum 1.

    Raises:
        ValueError: For labels or maps of another size, and without a frame.
    """
    frames = iter(maps)
    start = next(frames, None)
    if start is None:
        raise ValueError("There are no frames: the maps are empty.")
    begin = _unit(start)
    if first.ndim != 3 or first.shape[1:] != begin.shape[1:]:
        raise ValueError(f"Labels must be (K, {begin.shape[1]}, {begin.shape[2]}), as the maps; got {first.shape}.")
    labels = first.to(begin.device).float()
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.context)
    for value in frames:
        here = _unit(value)
        if here.shape != begin.shape:
            raise ValueError(f"Frames have maps {tuple(begin.shape)} and {tuple(here.shape)}; all must have one size.")
        context = [(begin, labels), *recent]
        found = _carry(here, torch.stack([c for c, _ in context]), torch.stack([seg for _, seg in context]), config)
        recent.append((here, found))
        yield found


def propagate_masks(
    task: Correspondence,
    frames: Sequence[Any],
    mask: Any,
    config: PropagationConfig = DAVIS_SETTINGS["sd"],
    *,
    prompt: str | None = None,
    class_labels: int | None = None,
) -> Tensor:
    """The objects of the first frame in every frame of a video.

    Labels are carried at the features' resolution, brought back bilinearly, stretched to 0..1 object by object, and
    the largest wins, as in the reference.

    Args:
        task: What reads features. With `image_size="keep"` frames are brought to `video_size`, as DIFT does.
        frames: PIL images, arrays or tensors of one size.
        mask: `(H, W)` object ids of the first frame, 0 for none; 255 counts as none.
        config: See `DAVIS_SETTINGS`.
        prompt: Of text models; the empty one if None.
        class_labels: Of class-conditional models.

    Returns:
        `(T, H, W)` uint8, the first the mask itself.

    Raises:
        ValueError: For fewer than two frames, a mask of another size or without objects.
    """
    pictures = [as_pil(frame) for frame in frames]
    if len(pictures) < 2:
        raise ValueError(f"{len(pictures)} frames; masks are carried from the first to others.")
    ids = torch.as_tensor(np.asarray(mask)).long()
    size: tuple[int, int] = (pictures[0].height, pictures[0].width)
    if tuple(ids.shape) != size:
        raise ValueError(f"The mask is {tuple(ids.shape)}, the first frame {size} (H, W); they must be of one size.")
    ids = ids.masked_fill(ids == 255, 0)
    if int(ids.min()) < 0 or not int(ids.max()):
        raise ValueError("The mask shows no object; ids count from 1, and 0 is none of them.")
    own_size = task.source.image_size
    seen = video_size(size) if own_size == "keep" else own_size

    def read() -> Iterator[Tensor]:
        for picture in pictures:
            if own_size == "keep":
                picture = picture.resize(seen[::-1], Image.Resampling.BILINEAR)
            yield task.encode(picture, prompt=prompt, class_labels=class_labels).map

    maps = read()
    begin = next(maps)
    grid = begin.shape[1], begin.shape[2]
    labels = torch.nn.functional.one_hot(_nearest(ids, grid), int(ids.max()) + 1).movedim(-1, 0)

    def chained() -> Iterator[Tensor]:
        yield begin
        yield from maps

    masks = [ids]
    for soft in propagate_labels(chained(), labels, config):
        large = torch.nn.functional.interpolate(soft[None].cpu(), size=seen, mode="bilinear", align_corners=False)[0]
        masks.append(_nearest(_stretched(large).argmax(0), size))
    return torch.stack(masks).to(torch.uint8)


def evaluate_videos(
    task: Correspondence,
    videos: Sequence[MaskedVideo],
    config: PropagationConfig = DAVIS_SETTINGS["sd"],
    *,
    prompt: str | None = None,
) -> dict[str, VideoScores]:
    """DAVIS' J and F of each video, and under `all` of all objects together.

    Args:
        task: What reads features.
        videos: See `load_davis`.
        config: See `DAVIS_SETTINGS`.
        prompt: Of text models.
    """
    found = {}
    for video in videos:
        truth = torch.stack([video.mask(at) for at in range(len(video))])
        frames = [video.frame(at) for at in range(len(video))]
        found[video.name] = video_scores(truth, propagate_masks(task, frames, truth[0], config, prompt=prompt).long())
    return {**found, "all": VideoScores.joined(list(found.values()))}


def video_size(size: tuple[int, int], short: int = _SHORT, multiple: int = _MULTIPLE) -> tuple[int, int]:
    """(H, W) to which DIFT brings frames: the short side `short`, the other rounded down to a multiple.

    Example:
        >>> video_size((480, 854)), video_size((1080, 1920))
        ((480, 832), (480, 832))
    """
    h, w = size
    other = max(multiple, int(short * max(h, w) / min(h, w)) // multiple * multiple)
    return (other, short) if h > w else (short, other)


def _carry(here: Tensor, context: Tensor, labels: Tensor, config: PropagationConfig) -> Tensor:
    """`(K, h, w)` of unit features `(C, h, w)`, those of the context `(n, C, h, w)`, and its labels `(n, K, h, w)`."""
    h, w = here.shape[1:]
    found = torch.empty(labels.shape[1], h, w, device=here.device)
    radius = max(h, w) if config.radius is None else config.radius
    for top in range(0, h, _BLOCK):
        for left in range(0, w, _BLOCK):
            rows, columns = slice(top, min(top + _BLOCK, h)), slice(left, min(left + _BLOCK, w))
            around = (
                slice(max(rows.start - radius, 0), min(rows.stop + radius, h)),
                slice(max(columns.start - radius, 0), min(columns.stop + radius, w)),
            )
            seen = context[:, :, around[0], around[1]].flatten(2)  # (n, C, window)
            target = here[:, rows, columns].flatten(1)  # (C, q)
            alike = seen.transpose(1, 2) @ target / config.temperature  # (n, window, q)
            near = (
                _near(around[0], rows, radius, here)[:, None, :, None]
                & _near(around[1], columns, radius, here)[None, :, None, :]
            )  # (window rows, window columns, target rows, target columns)
            alike = alike.masked_fill(~near.flatten(2).flatten(0, 1), -torch.inf).flatten(0, 1)
            least = alike.topk(min(config.top_k, len(alike)), dim=0).values[-1]
            # exp / sum, of which `exp(cosine / T)` alone would overflow from T = 0.011 down
            weights = alike.masked_fill(alike < least, -torch.inf).softmax(0)
            own = labels[:, :, around[0], around[1]].flatten(2).transpose(0, 1).flatten(1)  # (K, n * window)
            found[:, rows, columns] = (own @ weights).unflatten(1, (rows.stop - top, columns.stop - left))
    return found


def _near(window: slice, targets: slice, radius: int, like: Tensor) -> Tensor:
    """`(window, targets)`: which places along one side lie within the radius."""
    a = torch.arange(window.start, window.stop, device=like.device)
    b = torch.arange(targets.start, targets.stop, device=like.device)
    return (a[:, None] - b).abs() <= radius


def _unit(feature_map: Tensor) -> Tensor:
    return torch.nn.functional.normalize(feature_map.float(), dim=0)


def _nearest(ids: Tensor, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(ids.cpu().numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()


def _stretched(labels: Tensor) -> Tensor:
    """Each label's map to the range 0..1; one that is nowhere above 0 stays."""
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (labels - low) / (high - low).clamp(min=1e-12), labels)


__all__ = [
    "DAVIS_SETTINGS",
    "PropagationConfig",
    "evaluate_videos",
    "propagate_labels",
    "propagate_masks",
    "video_size",
]
