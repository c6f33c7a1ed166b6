"""DAVIS' measures of object masks in a video: region similarity J and boundary accuracy F (Perazzi et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BOUND = 0.008  # of the image's diagonal: how far apart two boundaries may lie


@dataclass(frozen=True)
class MaskScores:
    """What was measured of the masks of one object over the frames of a video.

    Attributes:
        mean: Over frames.
        recall: Share of frames above 0.5.
        decay: Mean over the first quarter of the frames minus the mean over the last.
    """

    mean: float
    recall: float
    decay: float


@dataclass(frozen=True)
class VideoScores:
    """DAVIS' numbers of a video or of many, in objects that count alike.

    Attributes:
        j: Of each object, region similarity.
        f: Of each object, boundary accuracy.
    """

    j: tuple[MaskScores, ...]
    f: tuple[MaskScores, ...]

    @property
    def j_mean(self) -> float:
        """Mean region similarity over objects."""
        return _mean([score.mean for score in self.j])

    @property
    def f_mean(self) -> float:
        """Mean boundary accuracy over objects."""
        return _mean([score.mean for score in self.f])

    @property
    def j_and_f(self) -> float:
        """The number that DAVIS ranks by: the mean of both."""
        return (self.j_mean + self.f_mean) / 2

    @classmethod
    def joined(cls, videos: Sequence[VideoScores]) -> VideoScores:
        """All objects of some videos."""
        return cls(tuple(s for video in videos for s in video.j), tuple(s for video in videos for s in video.f))


def region_similarity(truth: Tensor, found: Tensor) -> Tensor:
    """Jaccard index of binary masks `(..., H, W)`, `(...)` float64; 1 where both are empty.

    Example:
        >>> region_similarity(torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]]))
        tensor(0.3333, dtype=torch.float64)
    """
    truth, found = _masks(truth, found)
    union = (truth | found).sum((-2, -1)).double()
    return torch.where(union > 0, (truth & found).sum((-2, -1)) / union, 1.0)


def boundary_accuracy(truth: Tensor, found: Tensor, bound: float | None = None) -> Tensor:
    """F-measure of the boundaries of binary masks `(..., H, W)`, `(...)` float64; 1 where both have none.

    A boundary pixel counts as found if the other boundary has one within `bound` pixels.

    Args:
        truth: Of the object.
        found: As predicted.
        bound: Pixels; 0.008 of the diagonal, rounded up, if None.

    Example:
        >>> square = torch.zeros(40, 40, dtype=torch.bool)
        >>> square[10:30, 10:30] = True
        >>> boundary_accuracy(square, square.roll(1, 0)), boundary_accuracy(square, square.roll(9, 0)) < 0.6
        (tensor(1., dtype=torch.float64), tensor(True))
    """
    truth, found = _masks(truth, found)
    near = math.ceil(_BOUND * math.hypot(*truth.shape[-2:])) if bound is None else bound
    edges = torch.stack([mask_boundary(truth), mask_boundary(found)])
    wide = _dilated(edges.flatten(0, -3), near).view_as(edges)
    counts = edges.sum((-2, -1)).double()
    matched = (edges & wide.flip(0)).sum((-2, -1)).double()
    recall, precision = torch.where(counts > 0, matched / counts, 1.0)  # of no pixels all are right
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / total, 0.0)


def mask_boundary(mask: Tensor) -> Tensor:
    """Pixels of binary masks `(..., H, W)` that differ from the next one right, below or diagonally."""
    mask = mask.bool()
    edge = torch.zeros_like(mask)
    edge[..., :, :-1] |= mask[..., :, :-1] ^ mask[..., :, 1:]
    edge[..., :-1, :] |= mask[..., :-1, :] ^ mask[..., 1:, :]
    edge[..., :-1, :-1] |= mask[..., :-1, :-1] ^ mask[..., 1:, 1:]
    return edge


def video_scores(truth: Tensor, found: Tensor, void: int | None = 255) -> VideoScores:
    """DAVIS' semi-supervised numbers of a video: of every object of the first frame, over all but the end frames.

    Args:
        truth: `(T, H, W)` object ids, 0 for none.
        found: `(T, H, W)`; its first and last frame are not read.
        void: Id of pixels that belong to nothing, taken as background.

    Raises:
        ValueError: For unequal shapes, fewer than three frames, no object in the first frame, or ids in `found` that
            are no objects.
    """
    if truth.shape != found.shape or truth.ndim != 3:
        raise ValueError(f"Masks must both be (frames, H, W); got {tuple(truth.shape)} and {tuple(found.shape)}.")
    if len(truth) < 3:
        raise ValueError(f"{len(truth)} frames: the first and the last are not measured, so that three are needed.")
    if void is not None:
        truth = truth.masked_fill(truth == void, 0)
    count = int(truth[0].max())
    if not count:
        raise ValueError("The first frame shows no object (id above 0).")
    if int(found[1:-1].max()) > count or int(found[1:-1].min()) < 0:
        raise ValueError(f"Ids of found masks must be 0 to {count}, the objects of the first frame.")
    regions, boundaries = [], []
    for number in range(1, count + 1):
        pair = truth[1:-1] == number, found[1:-1] == number
        regions.append(_over_frames(region_similarity(*pair)))
        boundaries.append(_over_frames(torch.stack([boundary_accuracy(a, b) for a, b in zip(*pair, strict=True)])))
    return VideoScores(tuple(regions), tuple(boundaries))


def _over_frames(values: Tensor) -> MaskScores:
    ends = (torch.linspace(1, len(values), 5, dtype=torch.float64) + 1e-10).round().long() - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    recall = (values > 0.5).double().mean()
    return MaskScores(float(values.mean()), float(recall), float(first.mean() - last.mean()))


def _dilated(edges: Tensor, radius: float) -> Tensor:
    """Pixels `(N, H, W)` within `radius` of one that is set."""
    reach = math.floor(radius)
    steps = torch.arange(-reach, reach + 1, device=edges.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    return torch.nn.functional.conv2d(edges[:, None].float(), disk[None, None], padding=reach)[:, 0] > 0.5


def _masks(truth: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    if truth.shape != found.shape or truth.ndim < 2:
        raise ValueError(f"Masks must both be (..., H, W); got {tuple(truth.shape)} and {tuple(found.shape)}.")
    return truth.bool(), found.bool()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


__all__ = [
    "MaskScores",
    "VideoScores",
    "boundary_accuracy",
    "mask_boundary",
    "region_similarity",
    "video_scores",
]
