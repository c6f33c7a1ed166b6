"""`NoiseLevel`: how noisy an input is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor


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
        schedule: The `NoiseSchedule` it was resolved for; None for a request and for a level put together by hand.

    Values are floats for one level, or float32 tensors `(B,)` for one level per sample.

    Example:
        >>> NoiseLevel(nsr=0.5) < NoiseLevel(half_log_snr=0.0)
        True
    """

    timestep: Any = None
    nsr: Any = None
    half_log_snr: Any = None
    alpha: Any = None
    sigma: Any = None
    alpha_dot: Any = None
    sigma_dot: Any = None
    schedule: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.alpha is None) != (self.sigma is None):
            raise ValueError("A NoiseLevel put together by hand needs both alpha and sigma.")
        if self.resolved:
            return
        given = {k: v for k in ("timestep", "nsr", "half_log_snr") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"A NoiseLevel takes exactly one of timestep, nsr, half_log_snr; got {list(given) or 'none'}."
            )
        for name, value in given.items():
            _check_number(name, value)

    @property
    def resolved(self) -> bool:
        """Whether alpha and sigma are known."""
        return self.alpha is not None

    def to(self, device: torch.device | str) -> NoiseLevel:
        """The same levels with their tensors on a device, copied there in one piece and without waiting.

        Raises:
            ValueError: If the level is not resolved.
        """
        names = ("timestep", "nsr", "half_log_snr", "alpha", "sigma", "alpha_dot", "sigma_dot")
        held = {name: value for name in names if isinstance(value := getattr(self, name), Tensor) and value.ndim}
        if not self.resolved:
            raise ValueError(f"{self!r} is not resolved; only a resolved level has tensors to move.")
        if not held or torch.device(device).type == "cpu":
            return self
        packed = torch.stack([value.float() for value in held.values()])
        if packed.device.type == "cpu" and torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        moved: dict[str, Any] = dict(zip(held, packed.to(device, non_blocking=True).unbind(), strict=True))
        return replace(self, **moved)

    def __lt__(self, other: NoiseLevel) -> bool:
        return self._order() < other._order() if isinstance(other, NoiseLevel) else NotImplemented

    def __le__(self, other: NoiseLevel) -> bool:
        return self._order() <= other._order() if isinstance(other, NoiseLevel) else NotImplemented

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
        if value.ndim > 1 or not value.numel() or value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name} must be a number or a tensor (B,) of them; got {in_words(value)}.")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, such as 261; got {value!r} ({type(value).__name__}).")
    given = wide(value)
    if bool(given.isnan().any()) or (name == "timestep" and bool(given.isinf().any())):
        raise ValueError(f"{name} must be finite; got {in_words(value)}.")
    if name == "nsr" and bool((given < 0).any()):
        raise ValueError(f"nsr must be at least 0 (0 is the clean image); got {in_words(value)}.")


def wide(value: Any) -> Tensor:
    """As float64 on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double()
    return torch.tensor(float(value), dtype=torch.float64)


# A level, or a training timestep.
LevelLike = int | float | NoiseLevel


def in_words(value: Any) -> str:
    """For messages."""
    return (
        f"{value!r}" if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)} of {value.dtype}: {value}"
    )
