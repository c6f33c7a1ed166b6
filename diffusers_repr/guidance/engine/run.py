"""`SamplingRun`: what is known of one sampling run, and what guidances did in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture.caches import LaneCaches
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.guidance.base import GuidanceTerm
from diffusers_repr.noise import NoiseLevel, NoiseSchedule


class SamplingRun:
    """From one `set_timesteps` of the sampler to the next.

    Args:
        scheduler: The sampler whose steps are seen, or None.
        schedule: The process that it samples; `schedule.output` is the form of predictions.

    Attributes:
        batches: Number of rows -> which of them are conditional and which null.
        rescale: `guidance_rescale` of the pipeline that runs.
        nsr: Noise of the newest network call; None before the first.
        cached: Whether the network caches activations between steps.
        caches: What its caches hold for the lanes.
        levels: Of the network calls so far; empty again if the run was broken off, so that it is not judged.
    """

    def __init__(self, scheduler: Any, schedule: NoiseSchedule) -> None:
        self.scheduler, self.schedule = scheduler, schedule
        self.batches: dict[int, BatchLanes] = {}
        self.rescale = 0.0
        self.nsr: float | None = None
        self.cached, self.caches = False, LaneCaches()
        self.levels: list[NoiseLevel] = []
        self._peaks: dict[str, Tensor] = {}

    def note(self, label: str, correction: Tensor | None) -> None:
        """A guidance acted, with this correction; no synchronisation of a device."""
        peak = torch.zeros(()) if correction is None else correction.detach().abs().max()  # NaN wins
        before = self._peaks.get(label)
        self._peaks[label] = peak if before is None else torch.maximum(before.to(peak), peak)

    def is_whole(self, *, finished: bool) -> bool:
        """Whether it has reached its end: known to have (`finished`), or seen at the scheduler's last step."""
        times: Any = getattr(self.scheduler, "timesteps", None)
        at_end = finished or times is None
        return bool(self.levels) and (at_end or float(times[-1]) == float(self.levels[-1].timestep))

    def without_effect(self) -> list[str]:
        """Labels of the guidances whose corrections were zero throughout."""
        return [label for label, peak in self._peaks.items() if not bool(peak)]

    def refuse_rescale(self) -> None:
        """Raise ValueError if the running pipeline rescales what its own guidance makes."""
        if self.rescale > 0:
            raise ValueError(
                f"guidance_rescale={self.rescale} renormalises the pipeline's own guidance, and with it what is added "
                "here. Call the pipeline with guidance_rescale=0; for rescaled classifier-free guidance give "
                f"CFG(scale, rescale={self.rescale}), which replaces the pipeline's."
            )

    def judge(self, terms: Sequence[GuidanceTerm]) -> None:
        """Raise RuntimeError if one of these acted in no call; warn of what is not finite. Only once for a run."""
        levels, self.levels = self.levels, []
        if not levels:
            return
        for label, peak in self._peaks.items():
            if not bool(peak.isfinite()):
                warnings.warn(
                    f"{label} gave a correction that holds NaN or infinity, and so do the samples. See whether they "
                    "are without guidance; if so, try a lower scale, a loss without roots or logarithms of 0, or "
                    "float32.",
                    stacklevel=5,
                )
        idle = [term for term in terms if term.label not in self._peaks]
        if idle:
            nsr = [float(level.nsr) for level in levels]
            raise RuntimeError(
                f"{idle[0].label} did not act in any of {len(levels)} network calls: its interval "
                f"{idle[0].config.interval} (adaptive={idle[0].config.adaptive}) has none of their noise levels, "
                f"nsr {min(nsr):.4g} to {max(nsr):.4g} (timesteps {float(levels[-1].timestep):g} to "
                f"{float(levels[0].timestep):g})."
            )
