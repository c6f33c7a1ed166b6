"""`Lane`: one evaluation of a network; `NetworkCall`: what is known of a call whose lanes are being run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.noise import NoiseLevel

# (module, its arguments, its keyword arguments, the call) -> what the module is to return for these rows.
LaneFunction = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], "NetworkCall"], Any]
# As a lane function; what it returns is kept on the call.
Observer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], "NetworkCall"], Any]


@dataclass(frozen=True, eq=False)
class Lane:
    """One more evaluation of the conditional rows, in which some modules return something else.

    It runs in the same pass as the other lanes and joins them where the first of these modules stands: everything
    before is equal, so it is computed once.

    Attributes:
        name: Key of its output.
        modules: Full path -> what the module returns for the rows of this lane.
    """

    name: str
    modules: Mapping[str, LaneFunction]


@dataclass(eq=False)
class NetworkCall:
    """One call of the network by a pipeline or a loop.

    Attributes:
        inputs: Keyword inputs of the network's forward, all rows.
        rows: Rows of the batch.
        batch: Which rows are conditional and which null.
        x: What the network takes, `(rows, C, *size)`: `alpha x_0 + sigma eps`, without further input channels.
        level: Where the sampler stands; alpha and sigma are those of `x`.
        scale: `x` is `scale` times what the scheduler's step takes.
        observers: Key of an observer -> what it kept.
        joined: Path of the top-level module at which lanes joined; empty where they ran from the input on, None
            without lanes.
    """

    inputs: dict[str, Any]
    rows: int
    batch: BatchLanes
    x: Tensor
    level: NoiseLevel
    scale: float = 1.0
    observers: dict[str, Any] = field(default_factory=dict)
    joined: str | None = None

    @property
    def samples(self) -> int:
        """Rows with the condition."""
        return len(range(*self.batch.cond.indices(self.rows)))

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W) of `x`, (frames, H, W) of a video."""
        return tuple(self.x.shape[2:])
