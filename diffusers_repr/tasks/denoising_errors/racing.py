"""Racing: classes leave as soon as a sequential test on paired differences tells them from a better one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.paired import NOTHING, log_evidence
from diffusers_repr.tasks.denoising_errors.pairs import PairErrors
from diffusers_repr.tasks.denoising_errors.rules import Decisions, Kept, Rule, Units


@dataclass(frozen=True)
class Racing(Rule):
    """Evaluates in rounds; a unit leaves when one that is still there is better by a sequential test.

    A round is one fresh draw of noise at each of a few levels, the same for all classes, so the paired differences of
    rounds are independent and alike. The probability that the class whose expected error (over the noise, at these
    levels) is the lowest is eliminated, at whatever round the race ends, is at most `error`, if the differences of
    rounds are normal; their variances need not be known and may differ. The wrong crossing of the boundary takes the
    one of two sides, and the best unit has `units - 1` rivals, so the evidence of a pair must pass
    `(units - 1) / (2 error)`.

    What is promised is the class of the lowest expected error, which averaging without end would find; whether that is
    the image's true class is the model's affair. Races that reach `max_rounds` are decided by the lowest mean, and
    `decided` tells of them.

    Attributes:
        error: Probability, in (0, 1).
        n_levels: Levels of a round, evenly spread, or the first of `at`.
        at: Timesteps from the most telling to the least; see `calibrate`.
        max_rounds: When to stop.
        effect: See `log_evidence`.
    """

    error: float = 0.05
    n_levels: int = 1
    at: tuple[float, ...] | None = None
    max_rounds: int = 50
    effect: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error is a probability between 0 and 1; got {self.error!r}.")
        if not 0 < self.effect < math.inf:
            raise ValueError(f"effect must be a positive number; got {self.effect!r}.")
        check_whole("n_levels", self.n_levels)
        check_whole("max_rounds", self.max_rounds)
        if self.at is not None and len(self.at) < self.n_levels:
            raise ValueError(f"n_levels={self.n_levels}, but at= names {len(self.at)} timesteps.")

    def levels(self, schedule: NoiseSchedule) -> list[float]:
        """See `Rule`."""
        return even_timesteps(schedule, self.n_levels) if self.at is None else list(self.at[: self.n_levels])

    def bound(self, units: int) -> float:
        """Logarithm of what the evidence of a pair must pass."""
        return math.log((units - 1) / (2 * self.error))

    def __call__(self, errors: PairErrors, units: Units, images: int, levels: Sequence[float]) -> Decisions:
        """See `Rule`."""
        kept, live = Kept(errors, units, images), torch.ones(images, len(units), dtype=torch.bool)
        race = Race(images, len(units), self)
        for draw in range(self.max_rounds):
            racing = several_classes(live, units)
            if not bool(racing.any()):
                break
            values = kept.evaluate_round(live & racing[:, None], levels, draw)
            live = race.after(values, live, racing)
        return kept.decisions(live, ~several_classes(live, units), self.effect)


class Race:
    """The paired sums of the images of a race.

    Args:
        images: N.
        units: U.
        rule: Its settings.
    """

    def __init__(self, images: int, units: int, rule: Racing) -> None:
        self.rule, self.bound, self.rounds = rule, rule.bound(units), 0
        self.total = torch.zeros(images, units, units, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)

    def after(self, values: Tensor, live: Tensor, racing: Tensor) -> Tensor:
        """Who is there after a round.

        Args:
            values: The round's error of each unit, `(N, U)`; those of units that have left are not looked at.
            live: `(N, U)` bool.
            racing: Images whose race goes on, `(N,)` bool.
        """
        self.rounds += 1
        rows = racing.nonzero()[:, 0]
        one, other = values[rows, :, None], values[rows, None, :]
        difference = one - other  # [u, v] > 0: u is worse than v
        # NaN, of a unit that has left, counts as 0: its pairs are not looked at any more.
        difference = difference.where(difference.abs() > NOTHING * (one.abs() + other.abs()), 0.0)
        self.total[rows] += difference
        self.squares[rows] += difference.square()
        total, present = self.total[rows], live[rows]
        evidence = log_evidence(total, self.squares[rows], self.rounds, self.rule.effect)
        worse = (evidence >= self.bound) & (total > 0) & present[:, None, :]
        live = live.clone()
        live[rows] = present & ~worse.any(2)
        return live


def several_classes(live: Tensor, units: Units) -> Tensor:
    """Images in which units of more than one class are still there, `(N,)` bool."""
    classes = units.classes.expand(live.shape)
    low = classes.masked_fill(~live, len(units)).amin(1)
    return classes.masked_fill(~live, -1).amax(1) > low


__all__ = ["Race", "Racing", "several_classes"]
