"""From masks that overlap, with classes of their own, to one panoptic map."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from diffusers_repr.data.panoptic import PanopticMap


def panoptic_inference(
    probabilities: Tensor,
    masks: Tensor,
    stuff: Collection[int] = (),
    *,
    overlap: float = 0.8,
    threshold: float = 0.0,
) -> tuple[PanopticMap, dict[int, float]]:
    """Panoptic segments of one image from queries (Cheng et al. 2022, Mask2Former; ODISE, arXiv 2303.04803).

    Queries whose most probable class is the background are left out. Each pixel goes to the query with the largest
    product of class probability and mask probability, and belongs to its segment where the mask probability is at
    least 0.5. A segment stands if the pixels that went to it are at least `overlap` of those of its whole mask.
    Segments of one stuff class become one.

    Args:
        probabilities: `(Q, K + 1)` of the classes, the background last.
        masks: `(Q, H, W)` probability that a pixel is of the query.
        stuff: Classes of which an image has one segment at most.
        overlap: Least share of a mask that is still seen.
        threshold: Queries whose class is not more probable than this are left out.

    Returns:
        The map, and the class probability of each of its segments (of merged ones the largest).

    Raises:
        ValueError: For shapes that do not fit.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.2, 0.8]])
        >>> masks = torch.tensor([[[0.9, 0.1]], [[0.2, 0.9]]])
        >>> found, scores = panoptic_inference(probabilities, masks)
        >>> found.ids.tolist(), found.classes
        ([[1, 0]], {1: 0})
    """
    if probabilities.ndim != 2 or masks.ndim != 3 or len(probabilities) != len(masks) or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities (Q, K + 1) and masks (Q, H, W) are needed, one row a query; got "
            f"{tuple(probabilities.shape)} and {tuple(masks.shape)}."
        )
    scores, labels = probabilities.detach().float().max(dim=1)
    keep = (labels < probabilities.shape[1] - 1) & (scores > threshold)
    scores, labels, masks = scores[keep], labels[keep], masks.detach()[keep].float()
    ids = torch.zeros(masks.shape[1:], dtype=torch.long, device=masks.device)
    classes: dict[int, int] = {}
    found: dict[int, float] = {}
    merged: dict[int, int] = {}
    if not len(scores):
        return PanopticMap(ids, classes), found
    winner = (scores[:, None, None] * masks).argmax(dim=0)
    for query, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        won, whole = winner == query, masks[query] >= 0.5
        seen = won & whole
        if not bool(seen.any()) or int(won.sum()) < overlap * int(whole.sum()):
            continue
        number = merged.get(label, len(classes) + 1)
        ids[seen] = number
        classes[number] = label
        found[number] = max(score, found.get(number, 0.0))
        if label in stuff:
            merged[label] = number
    return PanopticMap(ids, classes), found


def semantic_inference(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Scores of the classes at each pixel, `(K, H, W)`: `sum_q p_q(class) m_q(pixel)`, the background left out.

    Args:
        probabilities: `(Q, K + 1)` of the classes, the background last.
        masks: `(Q, H, W)` probability that a pixel is of the query.

    Example:
        >>> semantic_inference(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[[0.5, 1.0]]])).tolist()
        [[[0.25, 0.5]], [[0.125, 0.25]]]
    """
    return torch.einsum("qk,qhw->khw", probabilities[:, :-1], masks)


__all__ = ["panoptic_inference", "semantic_inference"]
