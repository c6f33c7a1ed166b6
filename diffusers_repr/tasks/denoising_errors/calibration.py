"""Which noise levels tell classes apart, learned from a few labelled images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.tasks.denoising_errors.pairs import PairErrors, ask
from diffusers_repr.tasks.denoising_errors.rules import Units

Criterion = Literal["bits", "variance_ratio"]
_SCALES = torch.logspace(-1, 4, 101, dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """What was learned of the levels of a base, for one set of classes.

    Attributes:
        timesteps: From the most telling level to the least.
        telling: Of each, how much it tells; see `rank_levels`.
        effect: Of the first level, the root mean square of a paired difference in standard deviations of its noise:
            what a race may expect.
        rows: Labelled images it was learned from.
        scale: What mean errors are multiplied by, in a softmax, to give probabilities; None where it was not fitted.
    """

    timesteps: tuple[float, ...]
    telling: tuple[float, ...]
    effect: float
    rows: int
    scale: float | None = None


def told_bits(errors: Tensor, labels: Tensor) -> float:
    """Bits that errors tell of the class: those of a fair draw, less the cross entropy of the best softmax of them.

    Args:
        errors: `(n, K)`.
        labels: `(n,)`.

    Example:
        >>> told_bits(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(500, 1), torch.tensor([0, 1]).repeat(500)) > 0.98
        True
    """
    return (math.log(errors.shape[1]) - best_scale(errors, labels)[1]) / math.log(2)


def best_scale(errors: Tensor, labels: Tensor) -> tuple[float, float]:
    """The factor of `softmax(-factor * errors)` with the least cross entropy, and that, in nats.

    The cross entropy is that of n images and one more whose class is any, so that a few images on which nothing goes
    wrong are not taken for certainty.

    Args:
        errors: `(n, K)`.
        labels: `(n,)`.
    """
    centred = errors.double() - errors.double().amin(1, keepdim=True)
    smoothing = 1 / (len(labels) + 1)
    losses = [functional.cross_entropy(-s * centred, labels, label_smoothing=smoothing) for s in _SCALES]
    at = int(torch.stack(losses).argmin())
    return float(_SCALES[at]), float(losses[at])


def running_scales(errors: Tensor, labels: Tensor) -> tuple[float, ...]:
    """What the sum of the errors at the first, the first two, ... levels is worth; see `best_scale`.

    Args:
        errors: `(L, D, N, K)`, the levels in the order in which they will be evaluated.
        labels: `(N,)`.
    """
    many = labels.repeat(errors.shape[1])
    return tuple(best_scale(sums.flatten(0, 1), many)[0] for sums in errors.cumsum(0))


def variance_ratio(differences: Tensor, pairs: Tensor) -> float:
    """Between-class over within-class variance of paired differences.

    Args:
        differences: Error of another class minus that of the true one, of equal noise, `(n,)`.
        pairs: Which (true, other) class each is of, `(n,)`.
    """
    between, within = [], []
    for pair in pairs.unique().tolist():
        own = differences[pairs == pair]
        if len(own) > 1:
            variance = float(own.var())
            between.append(float(own.mean()) ** 2 - variance / len(own))
            within.append(variance)
    total = sum(within)
    return max(sum(between), 0.0) / total if total > 0 else 0.0


def class_errors(errors: PairErrors, units: Units, images: int, levels: Sequence[float], draws: int) -> Tensor:
    """Error of every class, `(L, D, N, K)` float64; of its best prompt, where prompts compete."""
    live, classes = torch.ones(images, len(units.of_prompt), dtype=torch.bool), int(units.classes.max()) + 1
    found = torch.full((len(levels), draws, images, classes), torch.inf, dtype=torch.float64)
    index = units.classes.expand(images, -1)
    for at, level in enumerate(levels):
        for draw in range(draws):
            asked = ask(live, [level], draw)
            values, _ = units.means(asked, errors(asked), images)
            found[at, draw] = found[at, draw].scatter_reduce(1, index, values, "amin")
    return found


def rank_levels(errors: Tensor, labels: Tensor, levels: Sequence[float], criterion: Criterion = "bits") -> Calibration:
    """Order levels by how much one evaluation at them tells of the class.

    `variance_ratio`, between-class over within-class variance of paired differences, prefers very noisy levels, where
    a few far classes are told apart with great certainty and near ones are not; `bits` asks for all at once.

    Args:
        errors: `(L, D, N, K)`, D >= 2; see `class_errors`.
        labels: Class of each image, `(N,)`.
        levels: Their timesteps.
        criterion: See above.

    Raises:
        ValueError: If all images are of one class, for one draw, or a criterion that there is not.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion={criterion!r}; take one of {', '.join(get_args(Criterion))}.")
    if labels.unique().numel() < 2:
        raise ValueError(
            f"All {len(labels)} images of the calibration are of one class ({int(labels[0])}); a level is good if it "
            "tells classes apart. Give images of several."
        )
    draws, classes = errors.shape[1], errors.shape[3]
    if draws < 2:
        raise ValueError(f"The variance that noise gives needs two draws a level at least; got {draws}.")
    other = torch.ones(len(labels), classes, dtype=torch.bool).scatter(1, labels[:, None], False)
    differences = errors - errors.gather(3, labels.expand(*errors.shape[:2], -1)[..., None])
    kinds = (labels[:, None] * classes + torch.arange(classes))[other]
    if criterion == "bits":
        telling = [told_bits(level.flatten(0, 1), labels.repeat(draws)) for level in errors]
    else:
        telling = [variance_ratio(level[:, other].flatten(), kinds.repeat(draws)) for level in differences]
    order = torch.tensor(telling).argsort(descending=True, stable=True).tolist()
    first = differences[order[0]][:, other]
    return Calibration(
        tuple(levels[at] for at in order), tuple(telling[at] for at in order), noise_effect(first), len(labels)
    )


def noise_effect(differences: Tensor) -> float:
    """Root mean square of paired differences over the deviation that noise gives them, within 0.1 and 10.

    Args:
        differences: `(D, n)`, D >= 2 draws of noise.
    """
    within = float(differences.var(0).mean())
    between = float(differences.mean(0).square().mean()) - within / len(differences)
    return min(max(math.sqrt(max(between, 0.0) / within), 0.1), 10.0) if within > 0 else 1.0


__all__ = [
    "Calibration",
    "Criterion",
    "best_scale",
    "class_errors",
    "noise_effect",
    "rank_levels",
    "running_scales",
    "told_bits",
    "variance_ratio",
]
