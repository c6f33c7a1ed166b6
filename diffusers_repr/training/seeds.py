"""Random numbers and learning rates as functions of the step alone, so that a run can start anywhere."""

from __future__ import annotations

import math

import numpy as np
import torch

from diffusers_repr.training.config import TrainingConfig


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed torch's global streams (CPU and devices) for one step of one process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to zero; `step` counts from 0."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    share = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * share)) / 2
