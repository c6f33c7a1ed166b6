"""What guided sampling cost: lanes, passes and backward passes of every network call of a pipeline."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffusers_repr.capture.flops import Shares, flops_shares, without_data
from diffusers_repr.noise import NoiseLevel


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
        first asked for, which takes a second or two for a large network. Backward passes are not in it. What caches of
        activations left out is counted as if it had run.
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
