"""An image as correspondence sees it, and what a call of it is made of: options, prompts, mutual neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.metrics.cosine_map import sample_map
from diffusers_repr.metrics.nearest import Likeness, mutual_nearest
from diffusers_repr.tasks.matches import Matches


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An image as correspondence sees it; match it with as many others as you like, without reading it again.

    Attributes:
        map: `(C, h, w)` float32.
        size: (H, W) of the image itself, which points are in pixels of.
        image: As it was passed.
    """

    map: Tensor
    size: tuple[int, int]
    image: Any = None

    def at(self, points: Tensor) -> Tensor:
        """Features `(N, C)` of points `(N, 2)`; see `sample_map`."""
        return sample_map(self.map, points, self.size)

    def cell_centres(self) -> Tensor:
        """`(h * w, 2)` as (x, y): the middle of every cell of the map, row by row, in pixels."""
        h, w = self.map.shape[1:]
        y, x = ((torch.arange(n) + 0.5) * (length / n) - 0.5 for n, length in zip((h, w), self.size, strict=True))
        return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=1).float()


def fill_prompt(prompt: str | None, category: str | None) -> str | None:
    """A prompt with the name of a category; without a name, of one that asks for it, the empty prompt.

    So does DIFT's code for objects that it has no prompt of.

    Example:
        >>> fill_prompt("a photo of a {category}", "cat"), fill_prompt("a photo of a {category}", None)
        ('a photo of a cat', '')
    """
    if prompt is None or "{category}" not in prompt:
        return prompt
    return "" if category is None else prompt.replace("{category}", category)


def mutual_matches(
    a: ImageFeatures, b: ImageFeatures, points: Tensor, among: Tensor | None, likeness: Likeness
) -> Matches:
    """Points of `a`, or the middles of its cells, and of `b` that choose each other."""
    others = b.cell_centres() if among is None else among
    found = mutual_nearest(a.at(points), b.at(others), likeness)
    first, second = found.first.cpu(), found.second.cpu()
    return Matches(points[first].float(), others[second].float(), found.scores.cpu(), a.size, b.size)


def check_options(points: Any, target_points: Any, likeness: str, similarity: bool) -> None:
    """Raise ValueError for options of a call that do not go together."""
    if points is None and target_points is not None:
        raise ValueError("target_points are candidates for points of the source; pass points, too.")
    if likeness not in ("cosine", "l2"):
        raise ValueError(f"likeness is 'cosine' or 'l2'; got {likeness!r}.")
    if likeness == "l2" and (target_points is None and points is not None):
        raise ValueError(
            "likeness='l2' is of mutual nearest neighbours: pass target_points, too, or no points. Single points are "
            "matched by cosine."
        )
    if likeness == "l2" and similarity:
        raise ValueError("Similarity maps are cosines; pass similarity=False with likeness='l2'.")


def for_both(value: Any, kind: type, name: str) -> tuple[Any, Any]:
    """What is asked of the source image and of the target."""
    if value is None or isinstance(value, kind):
        return value, value
    values = list(value)
    if len(values) != 2:
        raise ValueError(f"{name} is one for both images, or two; got {len(values)}.")
    return values[0], values[1]


def grid_points(size: tuple[int, int], count: int) -> Tensor:
    """About so many points spread evenly over an image, `(N, 2)` as (x, y).

    Args:
        size: (H, W).
        count: Of points; as many rows and columns as make the cells square.

    Example:
        >>> grid_points((20, 40), 2)
        tensor([[ 9.5000,  9.5000],
                [29.5000,  9.5000]])
    """
    h, w = size
    columns = max(1, round(math.sqrt(count * w / h)))
    rows = max(1, round(count / columns))
    x = (torch.arange(columns) + 0.5) * (w / columns) - 0.5
    y = (torch.arange(rows) + 0.5) * (h / rows) - 0.5
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


__all__ = ["ImageFeatures", "check_options", "fill_prompt", "for_both", "grid_points", "mutual_matches"]
