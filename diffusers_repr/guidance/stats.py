"""What guided sampling cost: lanes, passes and backward passes of every network call of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusers_repr.noise import NoiseLevel

if TYPE_CHECKING:
    from diffusers_repr.guidance.base import Term


@dataclass
class StepStats:
    """Cost of one call of the network by the pipeline.

    Attributes:
        level: The noise level.
        lanes: Evaluations of the batch of samples: the conditional rows are one, null rows another, and so on.
        passes: Calls of the network, whatever the batch.
        backward_passes: Backward passes through it (or through a classifier).
        joined: Top-level module at which perturbed lanes joined (what lies before was computed once for both); empty
            where they ran from the input on, None without such lanes.
        acted: Labels of the guidances that acted.
    """

    level: NoiseLevel
    lanes: int = 0
    passes: int = 0
    backward_passes: int = 0
    joined: str | None = None
    acted: list[str] = field(default_factory=list)


@dataclass
class GuidanceStats:
    """Cost of the newest run, and of all since `guide`.

    Attributes:
        steps: One entry a network call of the newest run.
        calls: Network calls of the pipeline since `guide`, those of earlier runs included.
    """

    steps: list[StepStats] = field(default_factory=list)
    calls: int = 0

    @property
    def lanes(self) -> int:
        """Lanes of the newest run."""
        return sum(step.lanes for step in self.steps)

    @property
    def passes(self) -> int:
        """Network passes of the newest run."""
        return sum(step.passes for step in self.steps)

    @property
    def backward_passes(self) -> int:
        """Backward passes of the newest run."""
        return sum(step.backward_passes for step in self.steps)

    def __repr__(self) -> str:
        return (
            f"GuidanceStats(calls={len(self.steps)}, lanes={self.lanes}, passes={self.passes}, "
            f"backward_passes={self.backward_passes})"
        )


class RunRecord:
    """Which guidances acted in a run, and whether they changed anything.

    Attributes:
        levels: Of the network calls so far.
    """

    def __init__(self) -> None:
        self.levels: list[NoiseLevel] = []
        self._acted: set[str] = set()
        self._peaks: dict[str, Tensor] = {}

    def acted(self, label: str) -> None:
        """A guidance had a weight other than 0."""
        self._acted.add(label)

    def note(self, label: str, correction: Tensor | None) -> None:
        """A guidance acted, with this correction; no synchronisation of a device."""
        self.acted(label)
        peak = torch.zeros(()) if correction is None else correction.detach().abs().max()  # NaN wins
        before = self._peaks.get(label)
        self._peaks[label] = peak if before is None else torch.maximum(before.to(peak), peak)

    def without_effect(self) -> list[str]:
        """Labels of the guidances whose corrections were zero throughout."""
        return [label for label, peak in self._peaks.items() if not bool(peak)]

    def not_finite(self) -> list[str]:
        """Labels of the guidances with a correction that holds NaN or infinity."""
        return [label for label, peak in self._peaks.items() if not bool(peak.isfinite())]

    def judge(self, terms: Sequence[Term]) -> None:
        """Raise RuntimeError if one of these acted in no call; warn of what is not finite. Only once for a run."""
        levels, self.levels = self.levels, []
        for label in self.not_finite() if levels else ():
            warnings.warn(
                f"{label} gave a correction that holds NaN or infinity, and so do the samples. See whether they are "
                "without guidance; if so, try a lower scale, a loss without roots or logarithms of 0, or float32.",
                stacklevel=5,
            )
        idle = [term for term in terms if term.label not in self._acted]
        if levels and idle:
            nsr = [float(level.nsr) for level in levels]
            raise RuntimeError(
                f"{idle[0].label} did not act in any of {len(levels)} network calls: its interval "
                f"{idle[0].config.interval} (adaptive={idle[0].config.adaptive}) has none of their noise levels, "
                f"nsr {min(nsr):.4g} to {max(nsr):.4g} (timesteps {float(levels[-1].timestep):g} to "
                f"{float(levels[0].timestep):g})."
            )
