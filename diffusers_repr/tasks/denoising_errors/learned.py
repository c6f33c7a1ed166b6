"""What a rule becomes when a few labelled images have told which levels tell classes apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from diffusers_repr.tasks.denoising_errors.calibration import (
    Calibration,
    Criterion,
    best_scale,
    rank_levels,
    running_scales,
)
from diffusers_repr.tasks.denoising_errors.likelihood import CalibratedRacing
from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import Averaging, Rule


def learned_rule(
    rule: Literal["calibrated"] | Racing | Averaging,
    errors: Tensor,
    labels: Tensor,
    levels: Sequence[float],
    criterion: Criterion,
    error: float | None = None,
) -> tuple[Rule, Calibration]:
    """A rule with levels in the order of what they tell, and what was learned of them.

    Args:
        rule: `calibrated`: a new `CalibratedRacing`; another takes the levels.
        errors: See `class_errors`.
        labels: Class ids of the images, `(N,)`.
        levels: Of the errors.
        criterion: See `rank_levels`.
        error: Of `CalibratedRacing`; 0.01 if None.
    """
    learned = rank_levels(errors, labels, levels, criterion)
    order = errors[[levels.index(level) for level in learned.timesteps]]
    first = order[: Racing().n_levels if rule == "calibrated" else rule.n_levels].mean(0).flatten(0, 1)
    learned = dataclasses.replace(learned, scale=best_scale(first, labels.repeat(errors.shape[1]))[0])
    if rule == "calibrated":
        scales = running_scales(order, labels)
        return CalibratedRacing(learned.timesteps, scales, 0.01 if error is None else error), learned
    if isinstance(rule, Racing):
        return dataclasses.replace(rule, at=learned.timesteps, effect=learned.effect), learned
    return dataclasses.replace(rule, at=learned.timesteps), learned


__all__ = ["learned_rule"]
