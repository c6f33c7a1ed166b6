"""`FlowMatchSDEScheduler`: the reverse-time SDE of a flow-matching model, by Euler-Maruyama.

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
from diffusers.utils.torch_utils import randn_tensor

PATHS = ("linear", "cosine")
DIFFUSIONS = ("time", "sigma", "g2", "zero")
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


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    """Samples `dx = (u - w/2 s) dt + sqrt(w) dW` backwards in time, `s = -eps/sigma` the score of the network.

    Every diffusion `w >= 0` keeps the marginals of the flow. Of N steps, the first N - 1 go along an even grid from
    `first_t` to `last_t` and add noise; the last goes from `last_t` to 0 and returns the mean (arXiv 2401.08740,
    section 2; arXiv 2410.06940, appendix). That last step is long, so the samples have a little less spread than the
    data: for data of standard deviation 0.4, `last_t=0.04` gives .3936 at N = 1000, and 0.001 gives .3998.

    Coefficients and each step are float64 (float32 on MPS, which has no float64). `step` returns the dtype of its
    `sample`: keep the samples in float32 or wider, whatever the dtype of the network.

    Args:
        num_train_timesteps: Timesteps are `num_train_timesteps * t`.
        path: `linear` (alpha = 1 - t, sigma = t) or `cosine` (alpha = cos(pi t/2), sigma = sin(pi t/2)).
        diffusion: w: `time` (2 t, what REPA samples both paths with), `sigma` (2 sigma), `g2` (the diffusion of the
            classical reverse SDE, infinite at t = 1: it needs `first_t` below 1 and many steps), `zero` (the ODE).
        diffusion_scale: Constant factor of w, 0 or larger.
        last_t: Where the step without noise begins, in (0, first_t).
        first_t: Where sampling begins, at most 1.
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
        ValueError: For a path, diffusion or kind of shift that does not exist, and numbers outside of their ranges.

    Example:
        >>> scheduler = FlowMatchSDEScheduler()
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps.tolist()
        [1000.0, 520.0, 40.0]
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "linear",
        diffusion: str = "time",
        diffusion_scale: float = 1.0,
        last_t: float = 0.04,
        first_t: float = 1.0,
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
        if diffusion not in DIFFUSIONS:
            raise ValueError(f"diffusion is one of {', '.join(DIFFUSIONS)}; got {diffusion!r}.")
        if not (diffusion_scale >= 0 and math.isfinite(diffusion_scale)):
            raise ValueError(f"diffusion_scale is a finite number, 0 or larger; got {diffusion_scale}.")
        if not 0 < last_t < first_t <= 1:
            raise ValueError(f"0 < last_t < first_t <= 1 is needed; got last_t={last_t}, first_t={first_t}.")
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift is a finite number above 0; got {shift}.")
        if time_shift_type not in SHIFT_TYPES:
            raise ValueError(f"time_shift_type is one of {', '.join(SHIFT_TYPES)}; got {time_shift_type!r}.")
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
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
        """Number of the coming step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the step to begin with, where `set_begin_index` gave one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step, as image-to-image pipelines do."""
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
            num_inference_steps: N, 2 or more: as many network calls.
            device: Of `timesteps`.
            timesteps: Own grid, falling, in (0, num_train_timesteps]. It is not shifted.
            sigmas: Own grid as values of sigma before the shift, falling, in (0, 1].
            mu: Of the shift with `use_dynamic_shifting`; not looked at without, as in diffusers.

        Raises:
            ValueError: For num_inference_steps below 2, a grid that does not fall or leaves its range, and a dynamic
                shift without mu.
        """
        factor, path = _factor(self.config, self._shift, mu), self.config["path"]
        given = _own_grid(num_inference_steps, timesteps, sigmas, self.config["num_train_timesteps"], path)
        if given is None:
            if num_inference_steps is None or num_inference_steps < 2:
                raise ValueError(
                    f"num_inference_steps is 2 or more, one step from first_t and one from last_t; got "
                    f"{num_inference_steps}."
                )
            ends = np.array([self.config["first_t"], self.config["last_t"]])
            first, last = _shifted(ends, 1 / factor, path).tolist()
            given = np.linspace(first, last, num_inference_steps)
            given = _shifted(given, factor, path)
            given[0], given[-1] = ends
        elif timesteps is None:
            given = _shifted(given, factor, path)
        if self.config["diffusion"] == "g2" and self.config["diffusion_scale"] > 0 and given[0] >= 1:
            raise ValueError(
                "diffusion='g2' is infinite at t = 1. Set first_t below 1 (such as 1 - 1 / num_inference_steps), or "
                "take diffusion='time'."
            )
        self.num_inference_steps = len(given)
        self._set_grid(given, device)

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """Number of the step at a timestep.

        Raises:
            ValueError: If the grid has no such timestep (to 1e-3).
        """
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        away = (grid.double().cpu() - float(timestep)).abs()
        index = int(away.argmin())
        if away[index] > 1e-3:
            raise ValueError(
                f"Timestep {float(timestep):g} is no step of this {type(self).__name__}: {len(grid)} steps from "
                f"{float(grid[0]):g} to {float(grid[-1]):g}. Give one of `scheduler.timesteps`."
            )
        return index

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
        """One step towards the data.

        Args:
            model_output: Velocity `(B, ...)` at `timestep`.
            timestep: One of `timesteps`; read before the first step only.
            sample: The state `(B, ...)`.
            generator: One, or one a sample: noise is drawn in float32 on the generator's device, sample by sample
                from a list, so that it does not depend on the batch.
            return_dict: False returns a tuple.

        Returns:
            `.prev_sample`, of the dtype of `sample`.

        Raises:
            ValueError: Before `set_timesteps`, after the last step, and for shapes or generators that do not fit.
        """
        _check_step(self, model_output, sample, generator)
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        t, after = self._times[self._step_index], self._times[self._step_index + 1]
        alpha, sigma, alpha_dot, sigma_dot = path_coefficients(self.config["path"], t)
        w, dt = self.diffusion_at(t), after - t

        dtype = torch.float32 if sample.device.type == "mps" else torch.float64
        x, u = sample.to(dtype), model_output.to(dtype)
        # eps = -sigma s of the velocity: unlike s, it is finite at both ends of the path.
        eps = (alpha * u - alpha_dot * x) / (alpha * sigma_dot - alpha_dot * sigma)
        x = x + (u + 0.5 * w / sigma * eps) * dt
        if after > 0 and w > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            x = x + math.sqrt(w * -dt) * noise.to(dtype)
        self._step_index += 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def diffusion_at(self, t: float) -> float:
        """`w(t)`, `diffusion_scale` included."""
        alpha, sigma, alpha_dot, sigma_dot = path_coefficients(self.config["path"], t)
        if self.config["diffusion"] == "zero" or self.config["diffusion_scale"] == 0:
            return 0.0
        if self.config["diffusion"] == "g2":
            w = 2 * sigma * (alpha * sigma_dot - alpha_dot * sigma) / alpha
        else:
            w = 2 * (t if self.config["diffusion"] == "time" else sigma)
        return self.config["diffusion_scale"] * w

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
        """`times`: t of each network call, float64; 0 is appended."""
        self._times = [*times.tolist(), 0.0]
        self.timesteps = torch.tensor(times * self.config["num_train_timesteps"], dtype=torch.float32, device=device)
        sigmas = [path_coefficients(self.config["path"], t)[1] for t in self._times]
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32, device="cpu")
        self._step_index = self._begin_index = None


def path_coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """`alpha, sigma` of a path at t in [0, 1], and their derivatives in t.

    Example:
        >>> path_coefficients("linear", 0.25)
        (0.75, 0.25, -1.0, 1.0)
    """
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    half = math.pi / 2
    alpha, sigma = math.cos(half * t), math.sin(half * t)
    return alpha, sigma, -half * sigma, half * alpha


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


def _check_step(
    scheduler: FlowMatchSDEScheduler, output: torch.Tensor, sample: torch.Tensor, generator: object
) -> None:
    name = type(scheduler).__name__
    if scheduler.num_inference_steps is None:
        raise ValueError(f"{name} has no steps yet; call `set_timesteps` first.")
    if scheduler.step_index is not None and scheduler.step_index >= scheduler.num_inference_steps:
        raise ValueError(f"{name} has done its {scheduler.num_inference_steps} steps; call `set_timesteps` again.")
    if output.shape != sample.shape:
        raise ValueError(
            f"model_output has shape {tuple(output.shape)}, sample {tuple(sample.shape)}; they must be equal. Of a "
            "network that predicts a variance too, give the first half of the channels."
        )
    if isinstance(generator, list) and len(generator) != len(sample):
        raise ValueError(f"{len(generator)} generators for a batch of {len(sample)}; give one, or one a sample.")


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
