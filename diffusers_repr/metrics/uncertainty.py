"""What an ensemble of classifiers says of a place together: the majority's class, and how much its members differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

TOP = 0.1  # share of an image's pixels that its score is the mean of
Cut = Literal["certain", "paper"]
_SKIPPED = 30  # most certain images that the paper's code drops


class EnsembleSums:
    """Members' logits, added one member after another: what the ensemble says is made of sums alone.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.members = num_classes, 0
        self._total: Tensor | None = None  # of the probabilities
        self._entropy: Tensor | None = None  # of the members' entropies
        self._votes: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """One member's logits `(B, K, ...)`."""
        log = logits.log_softmax(1)
        chances = log.exp()
        entropy = -(chances * log).sum(1)
        vote = logits.argmax(1, keepdim=True)
        if self._total is None or self._entropy is None or self._votes is None:
            self._total, self._entropy = torch.zeros_like(log), torch.zeros_like(entropy)
            self._votes = torch.zeros(log.shape, dtype=torch.int16, device=log.device)
        self._total += chances
        self._entropy += entropy
        self._votes.scatter_add_(1, vote, torch.ones_like(vote, dtype=torch.int16))
        self.members += 1

    def probabilities(self) -> Tensor:
        """`(B, K, ...)`, the members' mean."""
        assert self._total is not None
        return self._total / self.members

    def labels(self) -> Tensor:
        """`(B, ...)` int64: the class that most members chose; of several the smallest id."""
        assert self._votes is not None
        return self._votes.argmax(1)  # of equal ones the first, by torch's word

    def uncertainty(self) -> Tensor:
        """`(B, ...)`: the Jensen-Shannon divergence of the members, `H(mean p) - mean H(p)` in nats; 0 to `ln K`."""
        assert self._entropy is not None
        mean = self.probabilities()
        return (torch.special.entr(mean).sum(1) - self._entropy / self.members).clamp(min=0)  # rounding goes below


def jensen_shannon(probabilities: Tensor) -> Tensor:
    """`H(mean_e p_e) - mean_e H(p_e)` in nats, of members `(E, ..., K)`: 0 where they agree, at most `ln E`.

    DDPM-Seg (arXiv 2112.03126), as DatasetGAN before it, takes it for how uncertain a pixel's class is.

    Example:
        >>> two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(float(jensen_shannon(two)), 4), float(jensen_shannon(two[:1].repeat(3, 1)))
        (0.6931, 0.0)
    """
    entropy = torch.special.entr(probabilities).sum(-1)
    return torch.special.entr(probabilities.mean(0)).sum(-1) - entropy.mean(0)


def image_scores(uncertainty: Tensor, share: float = TOP) -> Tensor:
    """One number an image, `(B,)`: the mean of its most uncertain pixels.

    Args:
        uncertainty: `(B, H, W)`.
        share: Of the pixels; a tenth in the paper. At least one pixel is taken.

    Example:
        >>> image_scores(torch.arange(20.0).view(1, 4, 5))
        tensor([18.5000])
    """
    pixels = uncertainty.flatten(1)
    return pixels.topk(max(1, int(pixels.shape[1] * share)), dim=1).values.mean(1)


def certain_rows(scores: Sequence[float] | Tensor, drop: float = 0.1, cut: Cut = "certain") -> list[int]:
    """The rows of labelled images to keep, the most certain first.

    Args:
        scores: `image_scores` of every image.
        drop: Share of them to leave out.
        cut: `certain`: the most uncertain are left out. `paper`: what the code of DDPM-Seg keeps, `order[30 : 30 - n]`
            of n to drop: 30 of them are the most certain images, and nothing is left unless n is above 30, that is of
            fewer than 310 images by its share of a tenth.

    Raises:
        ValueError: For another cut, a share outside of 0 to 1, scores that are not finite, or if nothing is left.

    Example:
        >>> certain_rows([0.3, 0.1, 0.2], drop=0.34)
        [1, 2]
    """
    values = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if cut not in get_args(Cut):
        raise ValueError(f"cut={cut!r}; expected one of {', '.join(get_args(Cut))}.")
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop} is a share of the images; give a number from 0 and below 1.")
    if not bool(values.isfinite().all()):
        raise ValueError("Some scores are not finite; the features or the head are broken.")
    order, dropped = values.argsort(stable=True).tolist(), int(len(values) * drop)
    kept = order[_SKIPPED : _SKIPPED - dropped] if cut == "paper" else order[: len(order) - dropped]
    if not kept:
        why = f": the paper's cut is empty unless more than {_SKIPPED} are dropped, here {dropped}"
        raise ValueError(
            f"Of {len(order)} images, none would be kept with drop={drop}{why if cut == 'paper' else ''}. Label more "
            "images, or take cut='certain'."
        )
    return kept


__all__ = ["TOP", "Cut", "EnsembleSums", "certain_rows", "image_scores", "jensen_shannon"]
