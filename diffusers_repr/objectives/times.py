"""How training noise levels are drawn: uniform, logit-normal or lognormal in the noise-to-signal ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_repr.noise import NoiseLevel, NoiseSchedule

TimeSampling = Literal["uniform", "logit_normal", "lognormal"]
TIME_SAMPLINGS: tuple[TimeSampling, ...] = ("uniform", "logit_normal", "lognormal")


@dataclass(frozen=True)
class TimeSampler:
    """Draws one noise level a sample.

    Attributes:
        kind: `uniform` in time (whole timesteps for DDPM-like schedules); `logit_normal`, `logit(t) ~ N(mean, std)`
            with t in [0, 1] (Esser et al. 2024, arXiv 2403.03206, eq. 19); `lognormal`, `ln(sigma / alpha) ~ N(mean,
            std)` (Karras et al. 2022, arXiv 2206.00364, table 1; REPA, arXiv 2410.06940, as an option). On the linear
            flow path the last two are the same.
        mean: Of the normal; 0 by default, -1.2 in EDM.
        std: Of the normal; 1 by default, 1.2 in EDM.
    """

    kind: TimeSampling = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in TIME_SAMPLINGS:
            raise ValueError(f"time_sampling={self.kind!r}; expected one of {', '.join(TIME_SAMPLINGS)}.")
        if not self.std > 0:
            raise ValueError(f"The std of the time sampling must be positive; got {self.std}.")

    def draw(self, schedule: NoiseSchedule, count: int, generator: torch.Generator | None = None) -> NoiseLevel:
        """`count` levels of `schedule`, resolved; drawn on the CPU, so equal on every device and without a sync.

        Raises:
            ValueError: For uniform times on a schedule without bounded time (EDM, VE).
        """
        low, high = schedule.timestep_range
        if self.kind == "lognormal":
            log_nsr = self.mean + self.std * torch.randn(count, dtype=torch.float64, generator=generator)
            ends = schedule.log_nsr_range
            return schedule.resolve(NoiseLevel(half_log_snr=-log_nsr.clamp(*ends)))
        if schedule.kind in ("edm", "ve"):
            raise ValueError(
                f"A {schedule.kind} schedule has no uniform time; use time_sampling='lognormal' "
                "(EDM: mean -1.2, std 1.2)."
            )
        if self.kind == "logit_normal":
            unit = torch.sigmoid(self.mean + self.std * torch.randn(count, dtype=torch.float64, generator=generator))
        else:
            unit = torch.rand(count, dtype=torch.float64, generator=generator)
        if schedule.kind in ("vp", "patch_mask"):  # whole timesteps, as the table was made for
            return schedule.resolve((unit * (high + 1)).floor().clamp(low, high))
        return schedule.resolve(low + unit * (high - low))


__all__ = ["TimeSampler", "TimeSampling"]
