"""Mutual nearest neighbours of two sets of descriptors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusers_repr.metrics.checks import check_rows

Likeness = Literal["cosine", "l2"]
_VALUES = 2**24  # of the matrix of likenesses that are held at a time, 64 MiB


class MutualPairs(NamedTuple):
    """Rows of a, rows of b that choose each other, and their likeness: cosine, or minus the squared distance."""

    first: Tensor
    second: Tensor
    scores: Tensor


def mutual_nearest(a: Tensor, b: Tensor, likeness: Likeness = "cosine") -> MutualPairs:
    """Pairs `(i, j)` of which b_j is the nearest of all b to a_i, and a_i the nearest of all a to b_j.

    Of equally near rows the first is taken. The matrix of all likenesses is made in parts of 64 MiB.

    Args:
        a: `(N, C)`.
        b: `(M, C)`.
        likeness: `cosine` (DIFT's Stable Diffusion on HPatches) or `l2` (its ADM).

    Returns:
        Three tensors `(K,)`, K <= min(N, M), in the order of a.

    Raises:
        ValueError: For another likeness, unequal lengths, or rows that are not finite.

    Example:
        >>> a, b = torch.eye(3), torch.eye(3)[[2, 0]]
        >>> found = mutual_nearest(a, b)
        >>> found.first.tolist(), found.second.tolist()
        ([0, 2], [1, 0])
    """
    if likeness not in ("cosine", "l2"):
        raise ValueError(f"likeness is 'cosine' or 'l2'; got {likeness!r}.")
    check_rows(a, "a")
    check_rows(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Descriptors have {a.shape[1]} and {b.shape[1]} values; both sets must be of one kind.")
    a, b = a.float(), b.to(a.device).float()
    if likeness == "cosine":
        a, b = (torch.nn.functional.normalize(value, dim=1) for value in (a, b))
    forth, scores = [], []
    back_score = torch.full((len(b),), -torch.inf, device=a.device)
    back = torch.zeros(len(b), dtype=torch.int64, device=a.device)
    start = 0
    for part in a.split(max(1, _VALUES // len(b))):
        like = part @ b.T if likeness == "cosine" else -_squared_distances(part, b)
        best = like.max(1)
        forth.append(best.indices)
        scores.append(best.values)
        column = like.max(0)
        better = column.values > back_score
        back_score = torch.where(better, column.values, back_score)
        back = torch.where(better, column.indices + start, back)
        start += len(part)
    to, score = torch.cat(forth), torch.cat(scores)
    mutual = back[to] == torch.arange(len(a), device=a.device)
    return MutualPairs(mutual.nonzero().flatten(), to[mutual], score[mutual])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


__all__ = ["Likeness", "MutualPairs", "mutual_nearest"]
