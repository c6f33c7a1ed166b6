"""What guided sampling cost: lanes, passes and backward passes of every network call of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusers_repr.noise import NoiseLevel


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
