"""Racing by calibrated likelihoods: from labelled images, what errors are worth as evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks.denoising_errors.pairs import PairErrors
from diffusers_repr.tasks.denoising_errors.racing import several_classes
from diffusers_repr.tasks.denoising_errors.rules import Decisions, Kept, Rule, Units


@dataclass(frozen=True)
class CalibratedRacing(Rule):
    """Evaluates level after level, the most telling first; a unit leaves when the best one is far likelier.

    After n levels `-scales[n - 1] * sum of errors` is a log-likelihood, up to a constant, as `fit` learned it from
    labelled images. A unit leaves when the paired difference to the lowest sum makes it `(units - 1) / error` times
    less likely (Wald's test for several hypotheses). If the likelihoods are right, the true class is eliminated with a
    probability of at most `error`: under the truth the likelihood ratio of another class is a martingale that starts
    at 1 and passes b with a probability of at most `1 / b`, at whatever level one stops (Ville), and there are
    `units - 1` others. In contrast to `Racing` this is a promise about the image's class, and it rests on the
    calibration: on images that are like those, of which there were enough. `evaluate` tells what came of it.

    Attributes:
        at: Timesteps from the most telling to the least, each evaluated once.
        scales: After the first, the second, ... of them.
        error: Probability, in (0, 1).
    """

    at: tuple[float, ...]
    scales: tuple[float, ...]
    error: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error is a probability between 0 and 1; got {self.error!r}.")
        if len(self.at) != len(self.scales) or not self.at:
            raise ValueError(f"at and scales have one number a level; got {len(self.at)} and {len(self.scales)}.")
        if not all(0 <= scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be numbers from 0; got {self.scales}.")

    def levels(self, schedule: NoiseSchedule) -> list[float]:
        """See `Rule`."""
        return list(self.at)

    def __call__(self, errors: PairErrors, units: Units, images: int, levels: Sequence[float]) -> Decisions:
        """See `Rule`."""
        kept, live = Kept(errors, units, images), torch.ones(images, len(units), dtype=torch.bool)
        odds = torch.zeros(images, len(units), dtype=torch.float64)
        bound = math.log((len(units) - 1) / self.error)
        for level, scale in zip(levels, self.scales, strict=True):
            racing = several_classes(live, units)
            if not bool(racing.any()):
                break
            kept.evaluate_round(live & racing[:, None], [level], 0)
            odds = after(kept.sums, live, racing, scale, odds)
            live = live & ~(racing[:, None] & (odds <= -bound))
        return kept.decisions(live, ~several_classes(live, units), log_odds=odds)


def after(sums: Tensor, live: Tensor, racing: Tensor, scale: float, odds: Tensor) -> Tensor:
    """Log-likelihood of each unit less that of the best, `(N, U)`; of units and images that are done, as it was.

    Args:
        sums: Of the errors of each unit, `(N, U)`.
        live: `(N, U)` bool.
        racing: `(N,)` bool.
        scale: Of this number of levels.
        odds: Those before.
    """
    least = sums.masked_fill(~live, torch.inf).amin(1, keepdim=True)
    return torch.where(live & racing[:, None], -scale * (sums - least), odds)


def class_probabilities(log_odds: Tensor, classes: Tensor) -> Tensor:
    """Probability of each class, `(N, K)`, all likely alike before; of several units of a class the likeliest counts.

    Args:
        log_odds: `(N, U)`.
        classes: Class of each unit, `(U,)`.
    """
    best = torch.full((len(log_odds), int(classes.max()) + 1), -torch.inf, dtype=log_odds.dtype)
    return best.scatter_reduce(1, classes.expand(log_odds.shape), log_odds, "amax").softmax(1)


__all__ = ["CalibratedRacing", "class_probabilities"]
