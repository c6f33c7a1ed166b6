"""What guided sampling cost: lanes, passes and backward passes of every network call of a pipeline."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.flops import Shares, flops_shares, without_data
from diffusers_repr.noise import NoiseLevel

if TYPE_CHECKING:
    from diffusers_repr.guidance.base import GuidanceTerm


def _gone() -> None:
    """The network of a pickle."""


class Example:
    """A network and the shapes of a call of it, to count FLOPs with; the network is not kept alive.

    Args:
        model: The network.
        inputs: Keyword inputs of its forward.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._inputs = without_data(inputs)
        self._known: Shares = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": _gone}  # a copy in another process has no network

    def shares(self, paths: Sequence[str]) -> Shares:
        """As `flops_shares`.

        Raises:
            RuntimeError: If the network is gone.
        """
        if not set(paths) <= self._known.keys():
            model = self._model()
            if model is None:
                raise RuntimeError("The network is gone; read `evaluations` while it is there.")
            self._known.update(flops_shares(model, paths, self._inputs))
        return self._known


@dataclass
class StepStats:
    """Cost of one call of the network by the pipeline.

    Attributes:
        level: The noise level.
        lanes: Predictions for the batch of samples: the conditional rows are one, null rows another, and so on. Each
            counts as one, however little of the network was run for it; `GuidanceStats.evaluations` tells that.
        passes: Calls of the network, whatever the batch; those left early too.
        backward_passes: Backward passes through it (or through a classifier).
        joined: Top-level module at which perturbed lanes joined (what lies before was computed once for both); empty
            where they ran from the input on, None without such lanes.
        joining: How many lanes did.
        stopped: For each pass that was left early, the layer at whose end it was.
        acted: Labels of the guidances that acted.
    """

    level: NoiseLevel
    lanes: int = 0
    passes: int = 0
    backward_passes: int = 0
    joined: str | None = None
    joining: int = 0
    stopped: list[str] = field(default_factory=list)
    acted: list[str] = field(default_factory=list)


@dataclass
class GuidanceStats:
    """Cost of the newest run, and of all since `guide`.

    Attributes:
        steps: One entry a network call of the newest run.
        calls: Network calls of the pipeline since `guide`, those of earlier runs included.
        example: The first of these calls.
    """

    steps: list[StepStats] = field(default_factory=list)
    calls: int = 0
    example: Example | None = field(default=None, repr=False)

    @property
    def lanes(self) -> int:
        """Lanes of the newest run."""
        return sum(step.lanes for step in self.steps)

    @property
    def passes(self) -> int:
        """Network passes of the newest run."""
        return sum(step.passes for step in self.steps)

    @property
    def evaluations(self) -> float:
        """Evaluations of the whole network for the batch of samples that the newest run really took, in FLOPs.

        A lane that joined the others at a module counts from there on, a pass that was left early up to the layer
        where it was; a weaker network's pass counts as one. The shares are counted on the meta device when this is
        first asked for, which takes a second or two for a large network. Backward passes are not in it.
        """
        total = float(self.lanes)
        paths = {path for step in self.steps for path in (step.joined, *step.stopped) if path}
        if not paths:
            return total
        assert self.example is not None
        shares = self.example.shares(sorted(paths))
        for step in self.steps:
            total -= step.joining * shares[step.joined][0] if step.joined else 0
            total -= sum(1 - shares[path][1] for path in step.stopped)
        return total

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

    def judge(self, terms: Sequence[GuidanceTerm]) -> None:
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
