"""`FlowMatchODEScheduler`: the probability-flow ODE of a flow-matching model, by Euler or Heun.

For networks that predict the velocity `u = alpha' x_0 + sigma' eps` of a path `x_t = alpha x_0 + sigma eps`, with t
from 0 (data) to 1 (noise): SiT (arXiv 2401.08740), REPA (arXiv 2410.06940). Needs torch, numpy and diffusers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

PATHS = ("linear", "cosine")
SOLVERS = ("euler", "heun")
SHIFT_TYPES = ("exponential", "linear")
# Settings that tell of another noise process.
_OTHER_PROCESS = ("beta_schedule", "sigma_data", "snr", "trained_betas")
# Settings of other flow-matching schedulers that are not known here, and the values at which they do nothing.
_FOREIGN: dict[str, object] = {
    "flow_shift": 1.0,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


class FlowMatchODEScheduler(SchedulerMixin, ConfigMixin):
    """Solves `dx = u dt` from t = 1 to 0 on an even grid of N steps.

    Heun's method corrects each step by the velocity at its end, but the last one: 2 N - 1 network calls, one a `step`,
    so `timesteps` names each inner grid point twice, first for the correction of the step that ends there. Whether a
    step is in its first half tells `state_in_first_order`. With `solver="euler"` and `path="linear"` the samples are
    those of diffusers' `FlowMatchEulerDiscreteScheduler` on the same grid.

    Each step is float64 (float32 on MPS, which has no float64). `step` returns the dtype of its `sample`: keep the
    samples in float32 or wider, whatever the dtype of the network.

    Args:
        num_train_timesteps: Timesteps are `num_train_timesteps * t`.
        path: `linear` (alpha = 1 - t, sigma = t) or `cosine` (alpha = cos(pi t/2), sigma = sin(pi t/2)); the ODE is
            the same, `sigmas` and `add_noise` are not.
        solver: `euler` (order 1) or `heun` (order 2).
        shift: Factor of the noise-to-signal ratio of each grid point, as in `FlowMatchEulerDiscreteScheduler`: on the
            linear path `t -> shift t / (1 + (shift - 1) t)`. Above 1 more steps are where it is noisy. It moves the
            grid alone, never what a timestep means.
        use_dynamic_shifting: Take the shift from the `mu` of `set_timesteps` instead, which pipelines compute from the
            size of the image.
        base_shift: Kept for pipelines that compute `mu`: its value at `base_image_seq_len` tokens.
        max_shift: Likewise, at `max_image_seq_len` tokens.
        base_image_seq_len: See `base_shift`.
        max_image_seq_len: See `max_shift`.
        time_shift_type: The shift is `exp(mu)` if `exponential`, `mu` itself if `linear`.

    Raises:
        ValueError: For a path, solver or kind of shift that does not exist, and numbers outside of their ranges.

    Example:
        >>> scheduler = FlowMatchODEScheduler(solver="heun")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [1000.0, 750.0, 750.0, 500.0, 500.0, 250.0, 250.0]
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "linear",
        solver: str = "euler",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is 1 or more; got {num_train_timesteps}.")
        if path not in PATHS:
            raise ValueError(f"path is one of {', '.join(PATHS)}; got {path!r}.")
        if solver not in SOLVERS:
            raise ValueError(f"solver is one of {', '.join(SOLVERS)}; got {solver!r}.")
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift is a finite number above 0; got {shift}.")
        if time_shift_type not in SHIFT_TYPES:
            raise ValueError(f"time_shift_type is one of {', '.join(SHIFT_TYPES)}; got {time_shift_type!r}.")
        self.order = SOLVERS.index(solver) + 1
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._held: tuple[torch.Tensor, torch.Tensor, float] | None = None
        # Made from this config, a scheduler of another process refuses to step.
        self.register_to_config(prediction_type="flow_prediction")
        self._shift = shift
        table = np.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        self._set_grid(table if use_dynamic_shifting else _shifted(table, shift, path), "cpu")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the settings of another flow-matching one, of diffusers or of this kind.

        Args:
            config: `scheduler.config`.
            return_unused_kwargs: Also return what was not used.
            **kwargs: Settings to take instead.

        Raises:
            ValueError: For a config of another noise process, and a setting that would be lost.
        """
        if isinstance(config, Mapping):
            config = {**config, **{name: kwargs.pop(name) for name in _FOREIGN if name in kwargs}}
            _check_config(cls.__name__, config, kwargs)
            config.pop("prediction_type", None)  # checked, and the same for all
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        # diffusers looks for names of its own only, in the order of a set.
        return [cls, *sorted(super()._get_compatibles(), key=lambda other: other.__name__)]

    @property
    def shift(self) -> float:
        """The shift of the next `set_timesteps`, where it is not dynamic."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Take another shift from the next `set_timesteps` on.

        Raises:
            ValueError: Unless it is a finite number above 0.
        """
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift is a finite number above 0; got {shift}.")
        self._shift = shift

    @property
    def step_index(self) -> int | None:
        """Number of the coming network call; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the network call to begin with, where `set_begin_index` gave one."""
        return self._begin_index

    @property
    def state_in_first_order(self) -> bool:
        """Whether the coming network call is the first of its step; False for the correction of Heun's method."""
        return self._held is None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later network call, the first of a step, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | np.ndarray | None = None,
        sigmas: Sequence[float] | torch.Tensor | np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the grid; give one of the three. 0, where sampling ends, is no part of it.

        Args:
            num_inference_steps: N, 1 or more: N network calls of Euler's method, 2 N - 1 of Heun's.
            device: Of `timesteps`.
            timesteps: Own grid, falling, in (0, num_train_timesteps]; each point once. It is not shifted.
            sigmas: Own grid as values of sigma before the shift, falling, in (0, 1].
            mu: Of the shift with `use_dynamic_shifting`; not looked at without, as in diffusers.

        Raises:
            ValueError: For no step, a grid that does not fall or leaves its range, and a dynamic shift without mu.
        """
        factor = _factor(self.config, self._shift, mu)
        given = _own_grid(
            num_inference_steps, timesteps, sigmas, self.config["num_train_timesteps"], self.config["path"]
        )
        if given is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps is 1 or more; got {num_inference_steps}.")
            given = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        if timesteps is None:
            given = _shifted(given, factor, self.config["path"])
        self.num_inference_steps = len(given)
        self._set_grid(given, device)

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """Number of the network call at a timestep; of two, the one that begins a step.

        Raises:
            ValueError: If the grid has no such timestep (to 1e-3).
        """
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        away = (grid.double().cpu() - float(timestep)).abs()
        nearest = (away == away.min()).nonzero().reshape(-1)
        if float(away.min()) > 1e-3:
            raise ValueError(
                f"Timestep {float(timestep):g} is no step of this {type(self).__name__}: {len(grid)} steps from "
                f"{float(grid[0]):g} to {float(grid[-1]):g}. Give one of `scheduler.timesteps`."
            )
        return int(nearest[-1])

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: the network takes the state itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step, or one half of a step of Heun's method, towards the data.

        Args:
            model_output: Velocity `(B, ...)` at `timestep`.
            timestep: One of `timesteps`; read before the first step only.
            sample: The state `(B, ...)`. The correction starts from the one that the step began with.
            generator: Not needed: nothing is drawn.
            return_dict: False returns a tuple.

        Returns:
            `.prev_sample`, of the dtype of `sample`.

        Raises:
            ValueError: Before `set_timesteps`, after the last step, for shapes that do not fit, and for a beginning
                in the middle of a step.
        """
        _check_step(self, model_output, sample)
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index, heun = self._step_index, self.order == 2
        if heun and index % 2 and self._held is None:
            raise ValueError(
                f"Network call {index} is the correction of a step of Heun's method that was not begun. Begin at an "
                f"even one: `set_begin_index({index - 1})`."
            )
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64
        u = model_output.to(dtype)
        if self._held is None:
            x = sample.to(dtype)
            dt = self._times[index + 1] - self._times[index]
            # Heun's method leaves out the correction of the last step, whose velocity would be at t = 0.
            if heun and index + 1 < len(self.timesteps):
                self._held = (x, u, dt)
        else:
            x, first, dt = self._held
            u, self._held = 0.5 * (first + u), None
        self._step_index += 1
        x = (x + u * dt).to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """`alpha x_0 + sigma eps` at any timestep, one for all or one a sample, in the dtype of `original_samples`.

        Raises:
            ValueError: For a timestep outside of [0, num_train_timesteps].
        """
        return _noised(original_samples, noise, timesteps, self.config["num_train_timesteps"], self.config["path"])

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `add_noise`, with the arguments in the order of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _set_grid(self, times: np.ndarray, device: str | torch.device | None) -> None:
        """`times`: t of each step, float64; 0 is appended."""
        calls = np.concatenate([times[:1], times[1:].repeat(self.order)])
        self._times = [*calls.tolist(), 0.0]
        self.timesteps = torch.tensor(calls * self.config["num_train_timesteps"], dtype=torch.float32, device=device)
        sigmas = [t if self.config["path"] == "linear" else math.sin(0.5 * math.pi * t) for t in self._times]
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32, device="cpu")
        self._held = None
        self._step_index = self._begin_index = None


def _own_grid(
    count: int | None, timesteps: object, sigmas: object, num_train_timesteps: int, path: str
) -> np.ndarray | None:
    """The grid that was given, as t falling from at most 1 to above 0; None if none was given."""
    if timesteps is None and sigmas is None:
        return None
    if timesteps is not None and sigmas is not None:
        raise ValueError("Give timesteps or sigmas, not both.")
    name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    given = given.detach().cpu() if isinstance(given, torch.Tensor) else given
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} is a list of numbers; got an array of shape {values.shape}.")
    if count is not None and count != len(values):
        raise ValueError(f"num_inference_steps={count}, but {name} has {len(values)}. Leave num_inference_steps out.")
    largest = num_train_timesteps if sigmas is None else 1
    # Timesteps from float32 tables may stand a rounding above their end.
    if not (np.all(np.diff(values) < 0) and values[-1] > 0 and values[0] <= largest * (1 + 1e-6)):
        raise ValueError(
            f"{name} must fall, within (0, {largest}]; the end, 0, is added. Got {len(values)} from {values[0]:g} to "
            f"{values[-1]:g}."
        )
    values = np.minimum(values / largest, 1.0)
    return np.arcsin(values) * 2 / math.pi if path == "cosine" and sigmas is not None else values


def _check_step(scheduler: FlowMatchODEScheduler, output: torch.Tensor, sample: torch.Tensor) -> None:
    name = type(scheduler).__name__
    if scheduler.num_inference_steps is None:
        raise ValueError(f"{name} has no steps yet; call `set_timesteps` first.")
    if scheduler.step_index is not None and scheduler.step_index >= len(scheduler.timesteps):
        raise ValueError(f"{name} has done its {scheduler.num_inference_steps} steps; call `set_timesteps` again.")
    if output.shape != sample.shape:
        raise ValueError(
            f"model_output has shape {tuple(output.shape)}, sample {tuple(sample.shape)}; they must be equal. Of a "
            "network that predicts a variance too, give the first half of the channels."
        )


def _noised(
    x0: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor, num_train_timesteps: int, path: str
) -> torch.Tensor:
    """`alpha x_0 + sigma eps`, rounded once."""
    dtype = torch.float32 if x0.device.type == "mps" else torch.float64
    t = torch.as_tensor(timesteps).to(x0.device, dtype) / num_train_timesteps
    if bool(((t < 0) | (t > 1 + 1e-6)).any()):
        raise ValueError(f"Timesteps lie in [0, {num_train_timesteps}]; got {timesteps}.")
    t = t.reshape(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    half = math.pi / 2
    alpha, sigma = (1 - t, t) if path == "linear" else (torch.cos(half * t), torch.sin(half * t))
    return (alpha * x0.to(dtype) + sigma * noise.to(dtype)).to(x0.dtype)


def _check_config(name: str, config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Refuse the config of another noise process, and settings that would be dropped without a word."""
    origin = str(config.get("_class_name", name))
    flow = origin == name or origin.startswith(("FlowMatch", "LTXEulerAncestralRF"))
    flow = (flow and not any(key in config for key in _OTHER_PROCESS)) or bool(config.get("use_flow_sigmas"))
    if not flow or config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"{name} samples networks that predict the velocity of a flow; this config (prediction_type="
            f"{config.get('prediction_type')!r}) is of another noise process. Take a scheduler of that process, or "
            f"make {name}() if the network does predict a velocity."
        )
    lost = {key: config[key] for key, none in _FOREIGN.items() if config.get(key, none) not in (none, None)}
    if "shift" in changes:
        lost.pop("flow_shift", None)
    if lost:
        missing = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        other = ", ".join(f"{key}={_FOREIGN[key]!r}" for key in lost)
        other += f", or shift={lost['flow_shift']!r}" if "flow_shift" in lost else ""
        raise ValueError(
            f"{name} has no {missing} and its grid would be another one. Pass {other} to from_config, to go without."
        )


def _shifted(times: np.ndarray, factor: float, path: str) -> np.ndarray:
    """Grid points t whose noise-to-signal ratio is `factor` times that at `times`."""
    if factor == 1:
        return times
    if path == "linear":
        # With a factor below rounding the divisor at t = 1 is 0; what comes is cut to 1, which is right.
        with np.errstate(divide="ignore"):
            times = factor * times / (1 + (factor - 1) * times)
    else:
        angle = 0.5 * math.pi * times
        times = np.arctan2(factor * np.sin(angle), np.cos(angle)) * 2 / math.pi
    times = np.minimum(times, 1.0)
    if not np.all(np.diff(times) < 0):  # NaN too
        raise ValueError(f"A shift of {factor:g} leaves no distance between two steps; take a smaller one.")
    return times


def _factor(config: Mapping[str, Any], shift: float, mu: float | None) -> float:
    """What the noise-to-signal ratios are multiplied by."""
    if not config["use_dynamic_shifting"]:
        return shift
    exponential = config["time_shift_type"] == "exponential"
    if mu is None or not abs(mu) <= 700 or (mu <= 0 and not exponential):
        kind = "a number from -700 to 700" if exponential else "a number above 0, to 700"
        raise ValueError(
            f"With use_dynamic_shifting set_timesteps needs mu, {kind}; got {mu}. Pipelines compute it from "
            "base_shift, max_shift and the number of image tokens."
        )
    return math.exp(mu) if exponential else mu
