"""Grids of noise levels over a whole schedule."""

from __future__ import annotations

import math

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseSchedule


def even_timesteps(schedule: NoiseSchedule, count: int) -> list[float]:
    """`count` timesteps in the middles of equal parts of a schedule, the least noisy first.

    Where `count` divides the number of timesteps these are the paper's, `T // n // 2 + T // n * k`; elsewhere its code
    leaves the noisy end out, and this does not. EDM and VE schedules are divided evenly in the logarithm of sigma.

    Args:
        schedule: The process.
        count: At most the number of timesteps, where these are whole.

    Example:
        >>> even_timesteps(NoiseSchedule("flow", "velocity"), 4)
        [125.0, 375.0, 625.0, 875.0]
    """
    check_whole("levels", count)
    if schedule.kind in ("edm", "ve"):
        low, high = (math.log(end) for end in (schedule.sigma_min, schedule.sigma_max))
        logs = [low + (k + 0.5) * (high - low) / count for k in range(count)]
        return [0.25 * value if schedule.kind == "edm" else math.exp(value) for value in logs]
    steps = schedule.num_train_timesteps
    if count > steps:
        raise ValueError(f"levels={count} is more than the {steps} timesteps that the schedule has.")
    if schedule.kind == "vp":
        return [float((2 * k + 1) * steps // (2 * count)) for k in range(count)]
    return [(k + 0.5) * steps / count for k in range(count)]


__all__ = ["even_timesteps"]
