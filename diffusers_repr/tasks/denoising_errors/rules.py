"""Which pairs are evaluated, and who wins: plain averaging, the paper's schedule, and what all rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.paired import confidence
from diffusers_repr.tasks.denoising_errors.pairs import Asked, PairErrors, ask

Ensemble = Literal["mean", "best"]


@dataclass(frozen=True, eq=False)
class Units:
    """What competes: classes, of which each has the mean error of its prompts, or single prompts.

    Attributes:
        of_prompt: Unit of each prompt, `(P,)`.
        classes: Class of each unit, `(U,)`.
    """

    of_prompt: Tensor
    classes: Tensor

    @classmethod
    def of(cls, prompt_classes: Sequence[int], ensemble: Ensemble = "mean") -> Units:
        """The units of prompts.

        Args:
            prompt_classes: Class of each prompt.
            ensemble: `mean`: classes compete, by the mean over their prompts. `best`: prompts compete, and the class
                of the best one wins, as in the paper's code.
        """
        if ensemble not in get_args(Ensemble):
            raise ValueError(f"ensemble={ensemble!r}; take one of {', '.join(get_args(Ensemble))}.")
        found = torch.tensor(list(prompt_classes))
        if ensemble == "mean":
            return cls(found, torch.arange(int(found.max()) + 1))
        return cls(torch.arange(len(found)), found)

    def __len__(self) -> int:
        return len(self.classes)

    def means(self, asked: Asked, errors: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Sum of the errors of each image's units, `(N, U)`, a unit's prompts averaged; and of how many levels."""
        size = torch.bincount(self.of_prompt, minlength=len(self)).double()
        place = asked.images * len(self) + self.of_prompt[asked.prompts]
        flat = torch.zeros(2, images * len(self), dtype=torch.float64)
        flat[0].index_add_(0, place, errors)
        flat[1].index_add_(0, place, torch.ones_like(errors))
        total, count = flat.view(2, images, len(self)) / size
        return total, count


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a rule found.

    Attributes:
        labels: Class of each image, `(N,)`.
        errors: Mean error of each class over the levels it was evaluated at, `(N, K)`; of its best prompt, where
            prompts compete.
        evaluations: Rows of forwards each image took, `(N,)`.
        decided: Whether the rule's test ended the race, `(N,)`; None of rules without a test.
        confidence: See `confidence` of `paired.py`, `(N,)`.
        log_odds: Log-likelihood of each unit less the best one's, `(N, U)`, of rules that were calibrated.
        asked: All pairs that were evaluated.
        pair_errors: Their errors, `(n,)`.
    """

    labels: Tensor
    errors: Tensor
    evaluations: Tensor
    decided: Tensor | None
    confidence: Tensor
    log_odds: Tensor | None
    asked: Asked
    pair_errors: Tensor


def join_decisions(parts: Sequence[Decisions]) -> Decisions:
    """Decisions of one batch after another as those of all; places of images go on counting."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.labels))
    asked = replace(
        parts[0].asked,
        images=torch.cat([part.asked.images + start for part, start in zip(parts, starts, strict=False)]),
        prompts=torch.cat([part.asked.prompts for part in parts]),
        timesteps=torch.cat([part.asked.timesteps for part in parts]),
        draws=torch.cat([part.asked.draws for part in parts]),
    )
    tested = [part.decided for part in parts if part.decided is not None]
    decided = torch.cat(tested) if tested else None
    held = [part.log_odds for part in parts if part.log_odds is not None]
    odds = torch.cat(held) if held else None
    names = ("labels", "errors", "evaluations", "confidence", "pair_errors")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Decisions(**joined, decided=decided, log_odds=odds, asked=asked)


class Rule(ABC):
    """Chooses which pairs of an image are evaluated and decides."""

    @abstractmethod
    def levels(self, schedule: NoiseSchedule) -> list[float]:
        """The timesteps it may evaluate at."""

    @abstractmethod
    def __call__(self, errors: PairErrors, units: Units, images: int, levels: Sequence[float]) -> Decisions:
        """Decide all images; each is decided as it would be alone.

        Args:
            errors: Gives the errors of pairs.
            units: What competes.
            images: Number of images.
            levels: As `levels` gave them.
        """


class Kept:
    """The pairs of a run, gathered."""

    def __init__(self, errors: PairErrors, units: Units, images: int) -> None:
        self.source, self.units, self.images = errors, units, images
        self.sums = torch.zeros(images, len(units), dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)
        self._asked: list[Asked] = []
        self._errors: list[Tensor] = []
        self._rounds: list[Tensor] = []

    def evaluate(self, asked: Asked) -> Tensor:
        """Evaluate pairs, keep them, and return the mean error of each unit, `(N, U)`."""
        errors = self.source(asked)
        self._asked.append(asked)
        self._errors.append(errors)
        total, count = self.units.means(asked, errors, self.images)
        self.sums += total
        self.counts += count
        return total / count  # NaN where a unit was not asked for

    def evaluate_each(self, live: Tensor, levels: Sequence[float]) -> None:
        """Evaluate live units at levels, each of which counts as a round."""
        asked = ask(self.live_prompts(live), levels)
        self.evaluate(asked)
        for level in levels:
            own = asked.timesteps == level
            total, count = self.units.means(asked.take(own), self._errors[-1][own], self.images)
            self._rounds.append(total / count)

    def evaluate_round(self, live: Tensor, levels: Sequence[float], draw: int) -> Tensor:
        """Evaluate live units at levels that are a round together; the round's error of each, `(N, U)`."""
        self._rounds.append(self.evaluate(ask(self.live_prompts(live), levels, draw)))
        return self._rounds[-1]

    def live_prompts(self, live: Tensor) -> Tensor:
        """`(N, P)` from `(N, U)`."""
        return live[:, self.units.of_prompt]

    def decisions(
        self, live: Tensor, decided: Tensor | None = None, effect: float = 1.0, log_odds: Tensor | None = None
    ) -> Decisions:
        """The unit with the lowest mean among the live; of equal ones the first.

        Args:
            live: `(N, U)` bool.
            decided: See `Decisions`.
            effect: See `log_evidence`, for the confidence.
            log_odds: See `Decisions`.
        """
        means = self.sums / self.counts
        best = means.masked_fill(~live, torch.inf).argmin(1)
        names = ("images", "prompts", "timesteps", "draws")
        asked = Asked(*(torch.cat([getattr(part, name) for part in self._asked]) for name in names))
        classes = int(self.units.classes.max()) + 1
        errors = torch.full((self.images, classes), torch.inf, dtype=torch.float64)
        errors = errors.scatter_reduce(
            1, self.units.classes.expand(self.images, -1), means.nan_to_num(torch.inf), "amin"
        )
        evaluations = torch.bincount(asked.images, minlength=self.images)
        sure = confidence(torch.stack(self._rounds, 2), self.units.classes, self.units.classes[best], effect)
        labels, errors_of = self.units.classes[best], torch.cat(self._errors)
        return Decisions(labels, errors, evaluations, decided, sure, log_odds, asked, errors_of)


@dataclass(frozen=True)
class Averaging(Rule):
    """Every class at the same evenly spread levels, one draw of noise each; the lowest mean error wins.

    Attributes:
        n_levels: Number of levels.
        at: Timesteps to take instead, such as those that tell most.
    """

    n_levels: int = 20
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("n_levels", self.n_levels)

    def levels(self, schedule: NoiseSchedule) -> list[float]:
        """See `Rule`."""
        return even_timesteps(schedule, self.n_levels) if self.at is None else list(self.at[: self.n_levels])

    def __call__(self, errors: PairErrors, units: Units, images: int, levels: Sequence[float]) -> Decisions:
        """See `Rule`."""
        kept, live = Kept(errors, units, images), torch.ones(images, len(units), dtype=torch.bool)
        kept.evaluate_each(live, levels)
        return kept.decisions(live)


@dataclass(frozen=True)
class AdaptiveSchedule(Rule):
    """The paper's: after each stage only the units with the lowest mean error stay (arXiv 2303.16203, algorithm 2).

    Attributes:
        n_samples: Levels up to each stage, growing; the last is the size of the grid.
        to_keep: Units that stay after each stage, falling to 1.
    """

    n_samples: tuple[int, ...] = (50, 500)
    to_keep: tuple[int, ...] = (5, 1)

    def __post_init__(self) -> None:
        for name in ("n_samples", "to_keep"):
            values = [check_whole(name, value) for value in getattr(self, name)]
            object.__setattr__(self, name, tuple(values))
        if len(self.n_samples) != len(self.to_keep) or not self.to_keep:
            raise ValueError(
                f"n_samples and to_keep have one number a stage; got {len(self.n_samples)} and {len(self.to_keep)}."
            )
        if list(self.n_samples) != sorted(set(self.n_samples)) or list(self.to_keep) != sorted(self.to_keep)[::-1]:
            raise ValueError(
                f"n_samples must grow and to_keep fall from stage to stage; got {self.n_samples} and {self.to_keep}."
            )
        if self.to_keep[-1] != 1:
            raise ValueError(f"The last of to_keep must be 1, which decides; got {self.to_keep[-1]}.")

    def levels(self, schedule: NoiseSchedule) -> list[float]:
        """See `Rule`."""
        return even_timesteps(schedule, self.n_samples[-1])

    def stages(self) -> list[list[int]]:
        """Places in the grid that each stage evaluates anew; the grids of the stages are not nested."""
        size, seen, found = self.n_samples[-1], set[int](), []
        for count in self.n_samples:
            step = size // count
            new = [place for place in range(step // 2, size, step)[:count] if place not in seen]
            seen.update(new)
            found.append(new)
        return found

    def evaluations(self, units: int, prompts: int = 1) -> int:
        """Rows of forwards an image takes.

        Args:
            units: Classes, or prompts where these compete.
            prompts: Of each.

        Example:
            >>> AdaptiveSchedule((50, 500), (5, 1)).evaluations(10)
            2750
        """
        live = [units, *(min(units, keep) for keep in self.to_keep[:-1])]
        return sum(count * len(new) for count, new in zip(live, self.stages(), strict=True)) * prompts

    def __call__(self, errors: PairErrors, units: Units, images: int, levels: Sequence[float]) -> Decisions:
        """See `Rule`."""
        kept, live = Kept(errors, units, images), torch.ones(images, len(units), dtype=torch.bool)
        for places, keep in zip(self.stages(), self.to_keep, strict=True):
            kept.evaluate_each(live, [levels[place] for place in places])
            means = (kept.sums / kept.counts).masked_fill(~live, torch.inf)
            order = means.argsort(dim=1, stable=True)[:, :keep]
            live = torch.zeros_like(live).scatter(1, order, True) & live
        return kept.decisions(live)


__all__ = ["AdaptiveSchedule", "Averaging", "Decisions", "Ensemble", "Kept", "Rule", "Units", "join_decisions"]
