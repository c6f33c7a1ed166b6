"""A noise process as plain numbers, for the records of what was trained on it."""

from __future__ import annotations

import math

import torch

from diffusers_repr.hub.base_record import ProcessRecord
from diffusers_repr.hub.identity import plain_hash
from diffusers_repr.noise.schedule import NoiseSchedule

_SIGMAS = ("sigma_min", "sigma_max", "sigma_data")
_POINTS = 9  # timesteps at which two tables of a process are compared


def process_record(schedule: NoiseSchedule) -> ProcessRecord:
    """What a timestep means: kind and length, and the table at a few timesteps or the sigmas.

    Example:
        >>> process_record(NoiseSchedule("flow", "velocity")).kind
        'flow'
    """
    points: tuple[float | None, ...] = ()
    sigmas = {}
    if schedule.log_alpha_bar is not None:
        table = schedule.log_alpha_bar.double()
        table = table[torch.linspace(0, len(table) - 1, _POINTS).round().long()]
        values = (0.5 * (table - torch.log(-torch.expm1(table)))).tolist()
        points = tuple(value if math.isfinite(value) else None for value in values)
    elif schedule.kind in ("ve", "edm"):
        sigmas = {name: float(getattr(schedule, name)) for name in _SIGMAS}
    steps = int(schedule.num_train_timesteps)
    return ProcessRecord(schedule.kind, steps, points, sigmas, _fingerprint(schedule))


def _fingerprint(schedule: NoiseSchedule) -> str:
    """Hash of all of the process, to six digits of log alpha-bar."""
    table = [] if schedule.log_alpha_bar is None else [f"{v:.5e}" for v in schedule.log_alpha_bar.tolist()]
    ends = [float(getattr(schedule, name)) for name in _SIGMAS]
    ends += [schedule.patch_size] if schedule.kind == "patch_mask" else []  # others keep the hash they had
    return plain_hash([schedule.kind, schedule.num_train_timesteps, ends, table])


__all__ = ["process_record"]
