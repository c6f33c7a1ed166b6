"""What every guidance is: a frozen config, which `bind` turns into a `GuidanceTerm` of one model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.lanes import Lane, NetworkCall, Observer
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.guidance.step import GuidedStep
from diffusers_repr.noise import LevelLike, NoiseLevel, NoiseSchedule

_KEYS = itertools.count()

Interval = tuple[LevelLike, LevelLike]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Settings of one guidance method. Change one by making another: `dataclasses.replace(config, scale=2.0)`.

    Attributes:
        scale: Weight of its term; 0 is off, and the term is linear in it.
        interval: `(low, high)`, both included: the noise levels at which it acts, each a training timestep or a
            `NoiseLevel` (larger is noisier). None is all of them.
        adaptive: Lets the scale fall with the noise: `max(0, scale - adaptive (T - t))` at training timestep t of T
            (as `pag_adaptive_scale` of diffusers, whose T is 1000).
    """

    scale: float = 1.0
    interval: Interval | None = None
    adaptive: float = 0.0

    def __post_init__(self) -> None:
        check_finite(f"{type(self).__name__}.scale", self.scale)
        check_finite(f"{type(self).__name__}.adaptive", self.adaptive)
        if self.adaptive < 0:
            raise ValueError(f"adaptive must be at least 0; got {self.adaptive}.")
        if self.adaptive and self.scale < 0:
            raise ValueError(f"adaptive lets a positive scale fall to 0; got scale={self.scale}.")
        if self.interval is not None:
            _check_interval(self.interval)

    def bind(self, denoiser: Denoiser) -> GuidanceTerm:
        """Check everything against a model and prepare to act on it; the model is not touched.

        Raises:
            ValueError: If the method cannot act on this model as asked.
        """
        raise NotImplementedError

    def as_guider(self, *args: Any, **kwargs: Any) -> Any:
        """As a guider of diffusers' modular pipelines: `pipe.update_components(guider=PAG(3.0).as_guider(cfg=5.0))`.

        Its predictions are one network call each, as the pipelines' loops have it: nothing is shared.

        Args:
            *args: As `cfg=`.
            **kwargs: For `PAG` and `AutoGuidance` `cfg=`: classifier-free guidance beside it, a scale (1 is off) or a
                `CFG`. That a weaker model has the same noise process is not checked: a guider does not know it.

        Raises:
            NotImplementedError: For all but `CFG`, `PAG`, `AutoGuidance` and kinds registered with `make_guider`.
            ValueError: For an interval of noise levels without timesteps: a guider gets the timestep alone.
        """
        return make_guider(self, *args, **kwargs)

    def replace(self, **changes: Any) -> Any:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)


@functools.singledispatch
def make_guider(config: Guidance, *args: Any, **kwargs: Any) -> Any:
    """The guider of a guidance, by its kind: `@make_guider.register(MyGuidance)` adds one (`modular/guiders.py`).

    Raises:
        NotImplementedError: For a kind that none is registered for.
    """
    raise NotImplementedError(
        f"{type(config).__name__} cannot be a guider of a modular pipeline: a guider combines predictions of one "
        "input, made without gradient; it can ask neither for a gradient nor for a pass whose input follows from "
        "a prediction, nor can it move the latents. Use guide(pipe, ...) on a classic pipeline."
    )


class GuidanceTerm:
    """A guidance bound to a model: what it needs from the network's passes, and the correction it makes of them.

    Attributes:
        config: Its settings.
        label: For messages and `stats`.
        key: Unlike that of any other term; for its lane and its observers.
        lane: A perturbed lane that shares the call's own pass, or None.
        observers: Key -> (path of a module, function): what it keeps of the arguments of modules in the call's own
            pass, for the rows of the call.
        gradient: What it differentiates, or None.
        videos: Whether it guides networks of videos too, whose tensors are `(B, C, frames, H, W)`; the others are
            refused.
    """

    videos: bool = False

    def __init__(self, config: Guidance, denoiser: Denoiser) -> None:
        if not self.videos:
            require_images(denoiser, type(config).__name__)
        self.config, self.denoiser = config, denoiser
        self.label = type(config).__name__
        self.key = f"{self.label}-{next(_KEYS)}"
        self.lane: Lane | None = None
        self.observers: Mapping[str, tuple[str, Observer]] = {}
        self.gradient: GradientRequest | None = None
        self._bounds = nsr_bounds(config.interval, denoiser.schedule)
        if config.adaptive and denoiser.schedule.kind in ("ve", "edm"):
            raise ValueError(f"adaptive= counts training timesteps, which a {denoiser.schedule.kind} model lacks.")

    def inside(self, level: NoiseLevel) -> bool:
        """Whether a noise level is in its interval."""
        low, high = self._bounds
        slack, nsr = 1 + 1e-4, float(level.nsr)  # of sigmas in float32
        return low <= nsr * slack and nsr <= high * slack

    def weight(self, level: NoiseLevel) -> float:
        """Its scale at a noise level; 0 outside of its interval."""
        config = self.config
        if not self.inside(level):
            return 0.0
        if not config.adaptive:
            return config.scale
        steps = self.denoiser.schedule.num_train_timesteps
        return max(0.0, config.scale - config.adaptive * (steps - float(level.timestep)))

    def correction(self, step: GuidedStep) -> Tensor | None:
        """Change of the network's output, `(B, C, H, W)` in float32 or wider, for scale 1; None for none."""
        raise NotImplementedError

    def prepare(self, call: NetworkCall, forward: Callable[[dict[str, Any]], Any]) -> None:
        """Before its loss is asked for: room for passes of its own.

        Args:
            call: The call, at the latents that earlier terms and steps have moved to.
            forward: Runs the network once on keyword inputs, counted as a lane; hooks set meanwhile see it.
        """

    def starts(self) -> None:
        """A new sampling run begins."""


@dataclass(frozen=True, eq=False)
class GradientRequest:
    """What a term differentiates with respect to what the network takes.

    Attributes:
        loss: `(features, x0, call, x) -> loss`, a scalar (summed over samples). `features`: layer path -> map
            `(B, C, h, w)`; `x0`: the estimate of the clean data or None; `x`: the leaf, what the network takes in the
            conditional rows. All in float32 or wider, whatever the network's dtype.
        layers: Exact paths of what it reads.
        needs_x0: Whether it reads the estimate, and with it the whole network.
        update: `eps` (a correction), `latent_sign` or `latent_adam` (steps on the latents).
        checkpoint: Recompute activations in the backward pass.
        modules: What the loss calls: frozen and in eval mode while it is computed and differentiated.
        both: Sum the loss over the conditional and the null rows of the samples, of steps on the latents. Each half is
            given to `loss`, and to `prepare`, as a call whose conditional rows it is.
        steps: On the latents, before the network's own pass; each with a pass of its own.
    """

    loss: Callable[[Mapping[str, Tensor], Tensor | None, NetworkCall, Tensor], Tensor]
    layers: tuple[str, ...] = ()
    needs_x0: bool = False
    update: str = "eps"
    checkpoint: bool = False
    modules: tuple[nn.Module, ...] = ()
    both: bool = False
    steps: int = 1

    @property
    def reads_network(self) -> bool:
        """Whether the network has to run for it."""
        return self.needs_x0 or bool(self.layers)


def check_finite(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__}).")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}.")


def _check_interval(interval: Any) -> None:
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise ValueError(f"interval must be (low, high), two noise levels; got {interval!r}.")
    low, high = interval
    for end in interval:
        if not isinstance(end, NoiseLevel):
            check_finite("An end of interval", end)
        elif any(isinstance(value, Tensor) and value.numel() > 1 for value in vars(end).values()):
            raise ValueError(f"An end of interval is one noise level; got {end!r}, with one per sample.")
    if isinstance(low, Real) and isinstance(high, Real):
        wrong = low > high
    elif isinstance(low, NoiseLevel) and isinstance(high, NoiseLevel) and None not in (low.nsr, high.nsr):
        wrong = high < low
    else:
        return  # compared once the model's noise schedule is known
    if wrong:
        raise ValueError(_reversed(low, high))


def _reversed(low: Any, high: Any) -> str:
    return f"interval=({low!r}, {high!r}) is the wrong way round: give (low, high), larger is noisier."


def nsr_bounds(interval: Interval | None, schedule: NoiseSchedule) -> tuple[float, float]:
    """The ends of an interval as noise-to-signal ratios under a schedule.

    Raises:
        ValueError: If the ends are the wrong way round, or outside of the schedule.
    """
    if interval is None:
        return 0.0, math.inf
    try:
        low, high = (float(schedule.resolve(end).nsr) for end in interval)
    except ValueError as error:
        raise ValueError(f"interval=({interval[0]!r}, {interval[1]!r}): {error}") from None
    if low > high:
        raise ValueError(_reversed(*interval))
    return low, high
