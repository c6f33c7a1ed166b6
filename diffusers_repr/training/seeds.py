"""Random numbers and learning rates as functions of the step alone, so that a run can start anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler

from diffusers_repr.training.config import TrainingConfig


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed torch's global streams (CPU and devices) for one step of one process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then diffusers' schedule `config.lr_scheduler`; `step` counts from 0.

    The first step of the warm-up trains already, with a share of `1 / lr_warmup_steps`; diffusers gives it 0.
    """
    warmup = config.lr_warmup_steps
    share = _schedule(config.lr_scheduler, warmup, config.max_train_steps, config.lr_step_rules)
    return config.learning_rate * share(step + 1 if step < warmup else step)


@cache
def _schedule(name: str, warmup: int, steps: int, rules: str | None) -> Callable[[int], float]:
    """Share of the peak by step. diffusers makes it for an optimizer, which is none of the run's here."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    schedule: Any = get_scheduler(kind, stand_in, step_rules=rules, num_warmup_steps=warmup, num_training_steps=steps)
    share = schedule.lr_lambdas[0]
    if name == "piecewise_constant" and warmup:  # diffusers' has no warm-up
        return lambda step: min(step / warmup, 1.0) * share(step)
    return share
