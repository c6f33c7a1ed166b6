"""Noise levels and the forward process: pure functions, one direction (a larger `nsr` is noisier).

Notation (Karras et al. 2022, arXiv 2206.00364; Lipman et al. 2022, arXiv 2210.02747; the survey arXiv 2407.00783):
`x_t = alpha x_0 + sigma eps` is always the tensor that the network takes; for EDM it is `c_in (x_0 + sigma_edm eps)`.
Derivatives (`alpha_dot`, `sigma_dot`) are per unit of a time that runs from 0 (data) to 1 (noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["vp", "ve", "edm", "flow"]
Output = Literal["epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v", "score"]

OUTPUTS: tuple[Output, ...] = ("epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v", "score")


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """How noisy an input is. Give exactly one of `timestep`, `nsr` and `half_log_snr`.

    A level made by hand is a request; `NoiseSchedule.resolve` (or `Denoiser.level`) fills in the rest for one model.
    Levels compare by `nsr = sigma / alpha`: larger is noisier, for every scheduler.

    Attributes:
        timestep: What the network is told, in the units of the model's scheduler: 0 to 999 for most (flow models:
            `1000 sigma`; EDM: `ln(sigma_edm) / 4`; VE: sigma). May be fractional.
        nsr: Noise-to-signal ratio `sigma / alpha`, at least 0; infinite for pure noise.
        half_log_snr: `log(alpha / sigma)`, falls as noise grows.
        alpha, sigma: Coefficients of the forward process; known after resolution.
        alpha_dot, sigma_dot: Their derivatives per unit time in [0, 1]; known after resolution.

    Values are floats for one level, or float32 tensors `(B,)` for one level per sample.
    """

    timestep: Any = None
    nsr: Any = None
    half_log_snr: Any = None
    alpha: Any = None
    sigma: Any = None
    alpha_dot: Any = None
    sigma_dot: Any = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            return
        given = {k: v for k in ("timestep", "nsr", "half_log_snr") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"A NoiseLevel takes exactly one of timestep, nsr, half_log_snr; got {sorted(given) or 'none'}."
            )
        for name, value in given.items():
            _check_number(name, value)

    @property
    def resolved(self) -> bool:
        """Whether alpha and sigma are known."""
        return self.alpha is not None

    def __lt__(self, other: NoiseLevel) -> bool:
        return self._order() < other._order()

    def __gt__(self, other: NoiseLevel) -> bool:
        return self._order() > other._order()

    def _order(self) -> float:
        if self.nsr is None and self.half_log_snr is None:
            raise ValueError(
                f"{self!r} is not resolved: a timestep has a noise level only under a schedule. "
                "Call `denoiser.level(...)`."
            )
        nsr = self.nsr if self.nsr is not None else math.exp(-float(self.half_log_snr))
        if isinstance(nsr, Tensor) and nsr.numel() > 1:
            raise ValueError("A NoiseLevel with one level per sample has no single place in the order.")
        return float(nsr)

    def __repr__(self) -> str:
        shown = {k: getattr(self, k) for k in ("timestep", "nsr", "half_log_snr", "alpha", "sigma")}
        inner = ", ".join(
            f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items() if v is not None
        )
        return f"NoiseLevel({inner})"

    def to_dict(self) -> dict[str, float]:
        """The resolved scalar values, for manifests and reports."""
        return {k: float(getattr(self, k)) for k in ("timestep", "nsr", "half_log_snr", "alpha", "sigma")}


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim > 1 or value.dtype == torch.bool or not torch.isfinite(value.double()).all():
            raise ValueError(
                f"{name} must be a finite number or a tensor (B,) of them; got shape {tuple(value.shape)}."
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(
            f"{name} must be a number; got {value!r} ({type(value).__name__}). Larger timesteps are noisier, e.g. 261."
        )
    if math.isnan(float(value)) or (name != "nsr" and math.isinf(float(value))):
        raise ValueError(f"{name} must be finite; got {value!r}.")
    if name == "nsr" and float(value) < 0:
        raise ValueError(f"nsr must be at least 0 (0 is the clean image); got {value!r}.")


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process a network was trained on.

    Attributes:
        kind: `vp` (DDPM betas), `flow` (linear path), `edm` (Karras preconditioning) or `ve`.
        output: What the network returns, one of `OUTPUTS`.
        log_alpha_bar: `vp` only: float64 `(T,)`, `log` of the cumulative product of `1 - beta`.
        num_train_timesteps: T; a flow model's timestep is `T sigma`.
        sigma_min, sigma_max, sigma_data: EDM and VE only.
    """

    kind: Kind
    output: Output
    num_train_timesteps: int = 1000
    log_alpha_bar: Tensor | None = None
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    sigma_data: float = 1.0

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read a diffusers scheduler's training-time process; its sampling shift and grid are not applied.

        Raises:
            TypeError: For a scheduler without betas, flow sigmas or EDM parameters.
        """
        config, name = scheduler.config, type(scheduler).__name__
        steps = int(config.get("num_train_timesteps", 1000))
        predicts = config.get("prediction_type", "epsilon")
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or predicts == "flow_prediction":
            return cls("flow", "velocity", steps)
        if name.startswith("EDM"):
            output: Output = "edm_v" if predicts == "v_prediction" else "edm"
            return cls(
                "edm", output, steps, None, float(config.sigma_min), float(config.sigma_max), float(config.sigma_data)
            )
        if name.startswith("ScoreSdeVe"):
            return cls("ve", "score", steps, None, float(config.sigma_min), float(config.sigma_max))
        betas = getattr(scheduler, "betas", None)
        if betas is None:
            raise TypeError(
                f"{name} has no betas, flow sigmas or EDM parameters to read a noise schedule from. "
                "Pass `schedule=NoiseSchedule(...)` to Denoiser."
            )
        if predicts not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"{name} has prediction_type={predicts!r}; expected epsilon, sample or v_prediction.")
        # From the betas in float64: 1 - alpha_bar taken from the float32 table loses 3 digits at small t.
        return cls("vp", predicts, len(betas), torch.log1p(-betas.double()).cumsum(0).cpu())

    def resolve(self, level: NoiseLevel | float | Tensor) -> NoiseLevel:
        """Fill in a level for this process; a bare number is a timestep.

        Args:
            level: A request, a resolved level (returned as it is), a number or a tensor `(B,)` of timesteps.

        Returns:
            The level with timestep, alpha, sigma, nsr, half_log_snr and derivatives, computed in float64.

        Raises:
            ValueError: Outside the range of the schedule.
            TypeError: For anything that is no number.
        """
        if not isinstance(level, NoiseLevel):
            level = NoiseLevel(timestep=level)
        if level.resolved:
            return level
        many = any(isinstance(v, Tensor) and v.ndim == 1 for v in (level.timestep, level.nsr, level.half_log_snr))
        if level.timestep is not None:
            time = torch.as_tensor(level.timestep, dtype=torch.float64).cpu()
            self._check_range("timestep", time, *self.timestep_range)
        elif level.nsr is not None:
            time = self._time_of_log_nsr(torch.as_tensor(level.nsr, dtype=torch.float64).cpu().log())
        else:
            time = self._time_of_log_nsr(-torch.as_tensor(level.half_log_snr, dtype=torch.float64).cpu())
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
        return NoiseLevel(**{k: v.float() if many else float(v) for k, v in values.items()})

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Smallest and largest timestep that exist, both included."""
        if self.kind == "vp":
            return 0.0, self.num_train_timesteps - 1.0
        if self.kind == "flow":
            return 0.0, float(self.num_train_timesteps)
        if self.kind == "edm":
            return 0.25 * math.log(self.sigma_min), 0.25 * math.log(self.sigma_max)
        return self.sigma_min, self.sigma_max

    def _check_range(self, name: str, value: Tensor, low: float, high: float) -> None:
        slack = 1e-6 * max(abs(low), abs(high))
        if bool(((value < low - slack) | (value > high + slack)).any()):
            raise ValueError(
                f"{name} {value.tolist()} is outside [{low:g}, {high:g}], the range of this {self.kind} schedule "
                "(larger is noisier)."
            )

    def _log_nsr_table(self) -> Tensor:
        assert self.log_alpha_bar is not None
        return 0.5 * (torch.log(-torch.expm1(self.log_alpha_bar)) - self.log_alpha_bar)

    def _time_of_log_nsr(self, log_nsr: Tensor) -> Tensor:
        """Invert `nsr(timestep)`; between two training timesteps, linear in `log nsr`."""
        if self.kind == "flow":
            return self.num_train_timesteps * torch.sigmoid(log_nsr)
        if self.kind == "vp":
            table = self._log_nsr_table()
            self._check_range("log nsr", log_nsr, float(table[0]), float(table[-1]))
            right = torch.searchsorted(table, log_nsr.contiguous()).clamp(1, len(table) - 1)
            low, high = table[right - 1], table[right]
            part = ((log_nsr - low) / (high - low)).clamp(0, 1)
            return right - 1 + torch.where(torch.isinf(high), (log_nsr == high).double(), part)
        self._check_range("log nsr", log_nsr, math.log(self.sigma_min), math.log(self.sigma_max))
        return 0.25 * log_nsr if self.kind == "edm" else log_nsr.exp()

    def _process(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives at `time`, all float64."""
        one = torch.ones_like(time)
        if self.kind == "flow":
            sigma = time / self.num_train_timesteps
            return 1 - sigma, sigma, -one, one
        if self.kind == "ve":
            return one, time, torch.zeros_like(time), self.sigma_max * one
        if self.kind == "edm":
            edm = torch.exp(4 * time)
            norm = (edm**2 + self.sigma_data**2).sqrt()
            # d c_in / d sigma = -sigma / norm^3; unit time is sigma / sigma_max
            return (
                1 / norm,
                edm / norm,
                -self.sigma_max * edm / norm**3,
                self.sigma_max * self.sigma_data**2 / norm**3,
            )
        return self._vp(time)

    def _vp(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self.log_alpha_bar
        assert table is not None
        last = len(table) - 1
        index = time.clamp(0, last).floor().long()
        nxt = (index + 1).clamp(max=last)
        part = time.clamp(0, last) - index
        # Between timesteps log nsr is linear, so that timestep -> nsr -> timestep is the identity.
        nsr = self._log_nsr_table()
        log_nsr = torch.where(part > 0, nsr[index] + part * (nsr[nxt] - nsr[index]), nsr[index])
        log_ab = torch.where(part > 0, -torch.nn.functional.softplus(2 * log_nsr), table[index])
        alpha, sigma = (0.5 * log_ab).exp(), (-torch.expm1(log_ab)).sqrt()
        # d log(alpha_bar) / dt: central difference of the table, one-sided at its ends (a decision of ours).
        lo, hi = (index - 1).clamp(min=0), nxt
        slope = (table[hi] - table[lo]) / (hi - lo).clamp(min=1) * self.num_train_timesteps
        alpha_dot = 0.5 * alpha * slope
        if bool(torch.isinf(slope).any()):  # zero terminal SNR: the log diverges, alpha itself does not
            alphas = (0.5 * table).exp()
            plain = (alphas[hi] - alphas[lo]) / (hi - lo).clamp(min=1) * self.num_train_timesteps
            alpha_dot = torch.where(torch.isinf(slope), plain, alpha_dot)
        return alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma


def expand(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A level's value, ready to multiply `like` (B, ...): a float, or `(B, 1, ...)` on its device."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return float(value)
    if value.shape[0] != like.shape[0]:
        raise ValueError(f"{value.shape[0]} noise levels for a batch of {like.shape[0]}.")
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
    """`alpha x_0 + sigma eps`, multiplied in float32 (float64 stays) and cast to `x0.dtype` once.

    Args:
        x0: Clean images or latents `(B, ...)`.
        level: A resolved level, one for all or one per sample.
        noise: Standard normal, shape of `x0`.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 has {tuple(x0.shape)}; they must be equal.")
    if not level.resolved:
        raise ValueError(f"{level!r} is not resolved; call `denoiser.level(...)` or `schedule.resolve(...)` first.")
    wide = torch.promote_types(x0.dtype, torch.float32)
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    return (alpha * x0.to(wide) + sigma * noise.to(wide)).to(x0.dtype)


def to_x0_eps(
    output: Tensor, x_t: Tensor, level: NoiseLevel, kind: Output, sigma_data: float = 1.0
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Clean-data and noise estimates from one network output, each computed when called.

    Args:
        output: Network output, shape of `x_t`.
        x_t: What the network took.
        level: Resolved level.
        kind: What `output` means; see `OUTPUTS`. `edm` is F of Karras et al. 2022, eq. 7; `edm_v` is its negative.
        sigma_data: EDM only.

    Returns:
        `(x0, eps)`, two functions without arguments; `x0` raises ValueError where alpha = 0 leaves it undefined.
    """
    a, s = expand(level.alpha, x_t), expand(level.sigma, x_t)
    if kind == "epsilon":
        return partial(_divide, x_t - s * output, a, "x0", "alpha"), lambda: output
    if kind == "sample":
        return lambda: output, partial(_divide, x_t - a * output, s, "eps", "sigma")
    if kind == "v_prediction":
        n = a**2 + s**2
        return lambda: (a * x_t - s * output) / n, lambda: (s * x_t + a * output) / n
    if kind == "velocity":
        da, ds = expand(level.alpha_dot, x_t), expand(level.sigma_dot, x_t)
        delta = a * ds - da * s
        return lambda: (ds * x_t - s * output) / delta, lambda: (a * output - da * x_t) / delta
    if kind in ("edm", "edm_v"):
        # x = x_t / a is the unscaled state; a = c_in, s / a = sigma_edm
        edm = s / a
        c_skip = sigma_data**2 / (edm**2 + sigma_data**2)
        c_out = edm * sigma_data * a * (1 if kind == "edm" else -1)
        x0 = c_skip * x_t / a + c_out * output
        return lambda: x0, partial(_divide, x_t - a * x0, s, "eps", "sigma")
    if kind == "score":
        eps = -s * output
        return partial(_divide, x_t - s * eps, a, "x0", "alpha"), lambda: eps
    raise ValueError(f"Unknown network output {kind!r}; known: {', '.join(OUTPUTS)}.")


def _divide(top: Tensor, bottom: float | Tensor, what: str, name: str) -> Tensor:
    if bool((bottom == 0).any()) if isinstance(bottom, Tensor) else bottom == 0:
        raise ValueError(
            f"{what} is undefined where {name} = 0; take another form of the prediction or another level."
        )
    return top / bottom


class Prediction:
    """One network output in every form; each property is an exact conversion in float32 or wider.

    Attributes:
        output: The raw network output (after splitting off a learned variance), `(B, ...)`.
        x_t: What the network took.
        level: Resolved noise level.
    """

    def __init__(self, output: Tensor, x_t: Tensor, level: NoiseLevel, schedule: NoiseSchedule) -> None:
        wide = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
        self.output, self.x_t, self.level = output.to(wide), x_t.to(wide), level
        self._x0, self._eps = to_x0_eps(self.output, self.x_t, level, schedule.output, schedule.sigma_data)

    @property
    def x0(self) -> Tensor:
        """Estimate of the clean data; ValueError where alpha = 0 and the network does not give it."""
        return self._x0()

    @property
    def eps(self) -> Tensor:
        """Estimate of the noise."""
        return self._eps()

    @property
    def v(self) -> Tensor:
        """`alpha eps - sigma x_0` (Salimans and Ho 2022, arXiv 2202.00512)."""
        return expand(self.level.alpha, self.x_t) * self.eps - expand(self.level.sigma, self.x_t) * self.x0

    @property
    def velocity(self) -> Tensor:
        """`alpha_dot x_0 + sigma_dot eps`, per unit time in [0, 1] (VE and EDM: time is `sigma / sigma_max`)."""
        return expand(self.level.alpha_dot, self.x_t) * self.x0 + expand(self.level.sigma_dot, self.x_t) * self.eps

    @property
    def score(self) -> Tensor:
        """Gradient of the log density of `x_t`: `-eps / sigma`; ValueError where sigma = 0."""
        return _divide(-self.eps, expand(self.level.sigma, self.x_t), "score", "sigma")
