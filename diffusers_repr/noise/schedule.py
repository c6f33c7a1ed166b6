"""`NoiseSchedule`: the forward process that a network was trained on, read from its scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusers_repr.noise.level import NoiseLevel, wide

ProcessKind = Literal["vp", "ve", "edm", "flow", "cosine_flow", "patch_mask"]
Output = Literal["epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v", "score"]

PROCESS_KINDS: tuple[ProcessKind, ...] = ("vp", "ve", "edm", "flow", "cosine_flow", "patch_mask")
OUTPUTS: tuple[Output, ...] = ("epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v", "score")
# The config of a flow-matching scheduler tells a path by this name.
_PATHS: dict[str, ProcessKind] = {"linear": "flow", "cosine": "cosine_flow"}
_PREDICTION_TYPES: dict[str, Output] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "velocity",
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process a network was trained on.

    Attributes:
        kind: `vp` (DDPM betas), `flow` (linear path: alpha = 1 - t, sigma = t), `cosine_flow` (alpha = cos(pi t / 2),
            sigma = sin(pi t / 2)), `edm` (Karras preconditioning), `ve`, or `patch_mask`: no noise, but a share
            `sigma = t` of the patches set to 0, and `alpha = 1 - t` left as they are.
        output: What the network returns, one of `OUTPUTS`.
        log_alpha_bar: `vp` only: float64 `(T,)`, `log` of the cumulative product of `1 - beta`; -inf where the
            signal is gone (zero terminal SNR).
        num_train_timesteps: T; a flow model's timestep is `T t`, t from 0 (data) to 1 (noise).
        sigma_min, sigma_max, sigma_data: EDM and VE only.
        patch_size: `patch_mask` only: side of a patch, in cells of x_0.
    """

    kind: ProcessKind
    output: Output
    num_train_timesteps: int = 1000
    log_alpha_bar: Tensor | None = None
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    sigma_data: float = 1.0
    patch_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in PROCESS_KINDS or self.output not in OUTPUTS:
            raise ValueError(
                f"NoiseSchedule({self.kind!r}, {self.output!r}): kind is one of {', '.join(PROCESS_KINDS)}; "
                f"output is one of {', '.join(OUTPUTS)}."
            )
        if self.kind == "vp" and self.log_alpha_bar is None:
            raise ValueError("A vp schedule needs log_alpha_bar, e.g. torch.log1p(-betas.double()).cumsum(0).")
        table = self.log_alpha_bar
        # 0 at the end is -inf; differences of two of those are no numbers, and no rise.
        if table is not None and (not len(table) or not bool((table <= 0).all()) or bool((table.diff() > 1e-9).any())):
            raise ValueError(
                "alpha_bar of a vp schedule must fall from at most 1 towards 0, timestep by timestep; here it is "
                "empty, rises or is no number: the betas must lie between 0 and 1."
            )
        if self.kind in ("ve", "edm") and not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"0 < sigma_min < sigma_max is needed; got {self.sigma_min}, {self.sigma_max}.")
        if self.kind == "patch_mask" and (self.output != "sample" or self.patch_size < 1):
            raise ValueError(
                f"A patch_mask schedule needs patch_size, 1 or more, and a network that returns the sample; got "
                f"patch_size={self.patch_size} and output={self.output!r}."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read a diffusers scheduler's training-time process; its sampling shift and grid are not applied.

        Raises:
            TypeError: For a scheduler without betas, flow sigmas or EDM parameters.
            ValueError: For a prediction type that is none of diffusers' usual ones, or a reversed flow.
        """
        config, name = scheduler.config, type(scheduler).__name__
        steps = int(config.get("num_train_timesteps", 1000))
        predicts = config.get("prediction_type", "epsilon")
        if name.startswith("FlowMatch"):
            if config.get("invert_sigmas"):
                raise ValueError(f"{name}(invert_sigmas=True) runs from noise to data; larger must be noisier.")
            path = config.get("path", "linear")
            if path not in _PATHS:
                raise ValueError(f"{name} has path={path!r}; known: {', '.join(_PATHS)}.")
            return cls(_PATHS[path], "velocity", steps)
        if name == "PatchMaskScheduler":
            return cls("patch_mask", "sample", steps, patch_size=int(config.patch_size))
        if name.startswith(("EDM", "ScoreSdeVe")):
            low, high = float(config.sigma_min), float(config.sigma_max)
            if name.startswith("ScoreSdeVe"):
                return cls("ve", "score", steps, None, low, high)
            output: Output = "edm_v" if predicts == "v_prediction" else "edm"
            return cls("edm", output, steps, None, low, high, float(config.sigma_data))
        if predicts not in _PREDICTION_TYPES:
            raise ValueError(f"{name} has prediction_type={predicts!r}; expected {', '.join(_PREDICTION_TYPES)}.")
        if config.get("use_flow_sigmas") or predicts == "flow_prediction":
            return cls("flow", _PREDICTION_TYPES[predicts], steps)
        if getattr(scheduler, "betas", None) is None or getattr(scheduler, "alphas_cumprod", None) is None:
            raise TypeError(
                f"{name} has no betas, flow sigmas or EDM parameters to read a noise schedule from. "
                "Pass `schedule=NoiseSchedule(...)` to Denoiser."
            )
        table = _log_alpha_bar(scheduler)
        if config.get("timestep_type") == "continuous" and predicts == "v_prediction":
            # EulerDiscreteScheduler then tells the network ln(sigma) / 4: Karras preconditioning of unit data.
            log_nsr = 0.5 * (torch.log(-torch.expm1(table)) - table)
            ends = (config.get("sigma_min") or log_nsr[0].exp(), config.get("sigma_max") or log_nsr[-1].exp())
            return cls("edm", "edm_v", steps, None, float(ends[0]), float(ends[1]), 1.0)
        return cls("vp", _PREDICTION_TYPES[predicts], len(table), table)

    def resolve(self, level: NoiseLevel | float | Tensor) -> NoiseLevel:
        """Fill in a level for this process; a bare number is a timestep.

        Args:
            level: A request, a number or tensor `(B,)` of timesteps, a level resolved for an equal process or put
                together by hand with its alpha and sigma (these two are returned as they are).

        Returns:
            The level with timestep, alpha, sigma, nsr, half_log_snr and derivatives, computed in float64.

        Raises:
            ValueError: Outside the range of the schedule, or resolved for another process.
            TypeError: For anything that is no number.
        """
        if level is None:
            raise TypeError("timestep must be a number, such as 261, or a NoiseLevel; got None.")
        if not isinstance(level, NoiseLevel):
            level = NoiseLevel(timestep=level)
        if level.resolved:
            if level.schedule is not None and not self.same_process(level.schedule):
                raise ValueError(
                    f"{level!r} was resolved for another noise process ({level.schedule.kind}); here ({self.kind}) "
                    f"its timestep means another noise. Pass NoiseLevel(nsr={level.nsr}) for as much noise."
                )
            # Masks are made by the process, which a level put together by hand does not name.
            return replace(level, schedule=self) if self.kind == "patch_mask" and level.schedule is None else level
        name, given = next((k, v) for k in ("timestep", "nsr", "half_log_snr") if (v := getattr(level, k)) is not None)
        if name == "timestep":
            time = wide(given)
            self._check_range(name, given, time, self.timestep_range)
        else:
            log_nsr = wide(given).log() if name == "nsr" else -wide(given)
            low, high = self.log_nsr_range
            self._check_range(
                name, given, log_nsr, (low, high), tuple(math.exp(v) if name == "nsr" else -v for v in (low, high))
            )
            time = self._time_of_log_nsr(log_nsr.clamp(low, high))
        time = time.clamp(*self.timestep_range)
        alpha, sigma, alpha_dot, sigma_dot = self._process(time)
        values = {
            "timestep": time,
            "nsr": sigma / alpha,
            "half_log_snr": alpha.log() - sigma.log(),
            "alpha": alpha,
            "sigma": sigma,
            "alpha_dot": alpha_dot,
            "sigma_dot": sigma_dot,
        }
        return NoiseLevel(**{k: v.float() if v.ndim else float(v) for k, v in values.items()}, schedule=self)

    def clean_level(self, timestep: float) -> NoiseLevel:
        """No noise at all: `x_t` is `clean_alpha x_0`.

        Args:
            timestep: What the network is told, in the range of the schedule or not.
        """
        return NoiseLevel(timestep, nsr=0.0, half_log_snr=math.inf, alpha=self.clean_alpha, sigma=0.0)

    @property
    def clean_alpha(self) -> float:
        """What x_0 is multiplied by where no noise is left: 1, for EDM networks 1 / sigma_data."""
        return 1 / self.sigma_data if self.kind == "edm" else 1.0

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Smallest and largest timestep that exist, both included."""
        if self.kind in ("vp", "patch_mask"):
            return 0.0, self.num_train_timesteps - 1.0
        if self.kind in ("flow", "cosine_flow"):
            return 0.0, float(self.num_train_timesteps)
        if self.kind == "edm":
            return 0.25 * math.log(self.sigma_min), 0.25 * math.log(self.sigma_max)
        return self.sigma_min, self.sigma_max

    def same_process(self, other: NoiseSchedule) -> bool:
        """Whether timesteps mean the same noise in both; what the networks return may differ."""
        fields = ("kind", "num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "patch_size")
        if self is other or any(getattr(self, k) != getattr(other, k) for k in fields):
            return self is other
        mine, theirs = self.log_alpha_bar, other.log_alpha_bar
        return mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))

    @property
    def log_nsr_range(self) -> tuple[float, float]:
        """Smallest and largest logarithm of the noise-to-signal ratio that exist."""
        if self.kind in ("flow", "cosine_flow"):
            return -math.inf, math.inf
        if self.kind == "patch_mask":
            return -math.inf, math.log(self.num_train_timesteps - 1)
        if self.kind == "vp":
            assert self.log_alpha_bar is not None
            ends = self.log_alpha_bar[[0, -1]]
            low, high = (0.5 * (torch.log(-torch.expm1(ends)) - ends)).tolist()
            return low, high
        return math.log(self.sigma_min), math.log(self.sigma_max)

    def _check_range(
        self,
        name: str,
        given: Any,
        value: Tensor,
        ends: tuple[float, float],
        shown: tuple[float, ...] | None = None,
    ) -> None:
        slack = 1e-6 * max((abs(v) for v in ends if math.isfinite(v)), default=0.0)
        if bool(((value < ends[0] - slack) | (value > ends[1] + slack)).any()):
            low, high = sorted(shown or ends)
            given = given.tolist() if isinstance(given, Tensor) else given
            way = "smaller" if name == "half_log_snr" else "larger"
            raise ValueError(
                f"{name} {given} is outside [{low:g}, {high:g}], the range of this {self.kind} schedule "
                f"({way} is noisier)."
            )

    def _time_of_log_nsr(self, log_nsr: Tensor) -> Tensor:
        if self.kind in ("flow", "patch_mask"):
            return self.num_train_timesteps * torch.sigmoid(log_nsr)
        if self.kind == "cosine_flow":
            return self.num_train_timesteps * (2 / math.pi) * log_nsr.exp().atan()
        if self.kind == "edm":
            return 0.25 * log_nsr
        if self.kind == "ve":
            return log_nsr.exp()
        table = self.log_alpha_bar
        assert table is not None
        log_ab = -torch.logaddexp(torch.zeros_like(log_nsr), 2 * log_nsr)
        right = torch.searchsorted(-table, -log_ab).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        part = torch.where(high.isinf(), -torch.expm1(0.5 * (log_ab - low)), (log_ab - low) / (high - low))
        return right - 1 + part.clamp(0, 1)

    def _process(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives at `time`, all float64."""
        one = torch.ones_like(time)
        if self.kind in ("flow", "patch_mask"):
            sigma = time / self.num_train_timesteps
            return 1 - sigma, sigma, -one, one
        if self.kind == "cosine_flow":
            # cos(pi t / 2) as a sine, which is 0 at t = 1
            quarter, t = math.pi / 2, time / self.num_train_timesteps
            alpha, sigma = torch.sin(quarter * (1 - t)), torch.sin(quarter * t)
            return alpha, sigma, -quarter * sigma, quarter * alpha
        if self.kind == "ve":
            return one, time, torch.zeros_like(time), self.sigma_max * one
        if self.kind == "edm":
            edm = torch.exp(4 * time)
            norm = (edm**2 + self.sigma_data**2).sqrt()
            # d c_in / d sigma = -sigma / norm^3; unit time is sigma / sigma_max
            alpha_dot, sigma_dot = -edm / norm**3, self.sigma_data**2 / norm**3
            return 1 / norm, edm / norm, self.sigma_max * alpha_dot, self.sigma_max * sigma_dot
        return self._vp(time)

    def _vp(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Between two timesteps log(alpha_bar) is linear, as for a constant beta; alpha where the log ends at -inf."""
        table = self.log_alpha_bar
        assert table is not None
        index = time.floor().long()
        after, before = (index + 1).clamp(max=len(table) - 1), (index - 1).clamp(min=0)
        part = time - index
        low, high = table[index], table[after]
        log_ab = torch.where(high.isinf(), low + 2 * torch.log1p(-part), low + part * (high - low))
        alpha, sigma = (0.5 * log_ab).exp(), (-torch.expm1(log_ab)).sqrt()
        # At a timestep the slope is the central difference (one-sided at the ends), between two their difference.
        before = torch.where(part > 0, index, before)
        alphas, span = (0.5 * table).exp(), (after - before).clamp(min=1) / self.num_train_timesteps
        slope = (table[after] - table[before]) / span
        alpha_dot = torch.where(slope.isinf(), (alphas[after] - alphas[before]) / span, 0.5 * alpha * slope)
        return alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma


def _log_alpha_bar(scheduler: Any) -> Tensor:
    """float64, from the betas: `1 - alpha_bar` of the scheduler's float32 table loses three digits at small t."""
    log_ab = torch.log1p(-scheduler.betas.cpu().double()).cumsum(0)
    held = scheduler.alphas_cumprod.cpu().double()
    # Some samplers replace a last alpha_bar of 0 by 2**-24; CogVideoX's shift the table itself.
    return log_ab if torch.allclose(log_ab[:-1].exp(), held[:-1], rtol=0, atol=1e-5) else held.log()
