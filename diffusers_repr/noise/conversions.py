"""The forward process and the exact conversions between the forms of a prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_repr.noise.level import NoiseLevel
from diffusers_repr.noise.patch_mask import mask_patches, patch_scores
from diffusers_repr.noise.schedule import OUTPUTS, NoiseSchedule, Output


def expand(value: float | Tensor | None, like: Tensor) -> float | Tensor:
    """A level's value, ready to multiply `like` (B, ...): a float, or `(B, 1, ...)` on its device."""
    if value is None:
        raise ValueError("This noise level lacks alpha_dot and sigma_dot, which the conversion needs; give them too.")
    if not isinstance(value, Tensor) or value.ndim == 0:
        return float(value)
    if value.shape[0] != like.shape[0]:
        raise ValueError(f"{value.shape[0]} noise levels for a batch of {like.shape[0]}.")
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
    """`alpha x_0 + sigma eps`, multiplied in float32 (float64 stays) and cast to `x0.dtype` once.

    Under a `patch_mask` process patches of x_0 are set to 0 instead, those where the noise has the largest sums.

    Args:
        x0: Clean images or latents `(B, ...)`.
        level: A resolved level, one for all or one per sample.
        noise: Standard normal, shape of `x0`.

    Example:
        >>> level = NoiseSchedule("flow", "velocity").resolve(250)
        >>> add_noise(torch.ones(1, 2), level, torch.zeros(1, 2))
        tensor([[0.7500, 0.7500]])
    """
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be of a floating dtype; got {x0.dtype}. Images become x0 by `denoiser.encode`.")
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 has {tuple(x0.shape)}; they must be equal.")
    if not level.resolved:
        raise ValueError(f"{level!r} is not resolved; call `denoiser.level(...)` or `schedule.resolve(...)` first.")
    process = level.schedule
    if process is not None and process.kind == "patch_mask":
        scores = patch_scores(noise, process.patch_size)
        return mask_patches(x0, level.timestep, scores, process.patch_size, process.num_train_timesteps)
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
        return lambda: _divide(x_t - s * output, a, "x0", "alpha"), lambda: output
    if kind == "sample":
        return lambda: output, lambda: _divide(x_t - a * output, s, "eps", "sigma")
    if kind == "v_prediction":
        n = a**2 + s**2
        return lambda: (a * x_t - s * output) / n, lambda: (s * x_t + a * output) / n
    if kind == "velocity":
        da, ds = expand(level.alpha_dot, x_t), expand(level.sigma_dot, x_t)
        delta = a * ds - da * s
        return lambda: (ds * x_t - s * output) / delta, lambda: (a * output - da * x_t) / delta
    if kind in ("edm", "edm_v"):
        # a = c_in, s / a = sigma_edm, x = x_t / a: so c_skip x = d^2 a x_t, c_out = d s, eps = (x - x_0) a / s.
        d, f = sigma_data, output if kind == "edm" else -output
        return lambda: d * d * a * x_t + d * s * f, lambda: s * x_t - d * a * f
    if kind == "score":
        return lambda: _divide(x_t + s * s * output, a, "x0", "alpha"), lambda: -s * output
    raise ValueError(f"Unknown network output {kind!r}; known: {', '.join(OUTPUTS)}.")


def eps_shift_to_output(shift: Tensor, level: NoiseLevel, kind: Output, sigma_data: float = 1.0) -> Tensor:
    """The change of a network output that changes its noise estimate by `shift` while `x_t` stays.

    With `y = A x_t + B eps` it is `B shift`, where B is 1 for epsilon, `-sigma / alpha` for sample, `n / alpha` for
    v_prediction (`n = alpha^2 + sigma^2`), `D / alpha` for velocity (`D = alpha sigma_dot - alpha_dot sigma`),
    `-1 / (sigma_data alpha)` for edm (Karras et al. 2022, eq. 7), its negative for edm_v, and `-1 / sigma` for score.
    A guided score `s + w G` is the shift `-w sigma G`.

    Args:
        shift: Wanted change of eps `(B, ...)`.
        level: Resolved level, one for all or one per sample.
        kind: What the output means; see `OUTPUTS`.
        sigma_data: EDM only.

    Returns:
        Shape of `shift`, float32 or wider.

    Raises:
        ValueError: Where alpha = 0 (score: sigma = 0) makes B infinite, and for an unknown kind.

    Example:
        >>> level = NoiseSchedule("flow", "velocity").resolve(500)
        >>> eps_shift_to_output(torch.ones(1, 2), level, "velocity")
        tensor([[2., 2.]])
    """
    shift = shift.to(torch.promote_types(shift.dtype, torch.float32))
    a, s = expand(level.alpha, shift), expand(level.sigma, shift)
    what = f"The {kind} that changes eps"
    if kind == "epsilon":
        return shift
    if kind == "sample":
        return _divide(-s * shift, a, what, "alpha")
    if kind == "v_prediction":
        return _divide((a**2 + s**2) * shift, a, what, "alpha")
    if kind == "velocity":
        delta = a * expand(level.sigma_dot, shift) - expand(level.alpha_dot, shift) * s
        return _divide(delta * shift, a, what, "alpha")
    if kind in ("edm", "edm_v"):
        return _divide(-shift if kind == "edm" else shift, sigma_data * a, what, "alpha")
    if kind == "score":
        return _divide(-shift, s, what, "sigma")
    raise ValueError(f"Unknown network output {kind!r}; known: {', '.join(OUTPUTS)}.")


def output_difference(
    output: Tensor, other: Tensor, offset: Tensor, level: NoiseLevel, kind: Output, sigma_data: float = 1.0
) -> Tensor:
    """`eps(x) - eps(x')` of two inputs of one network, as a change of its output at `x`.

    With `x' = x + alpha offset` and `y = A x + B eps` at both, `B (eps(x) - eps(x')) = y - y' + A alpha offset`,
    where `A alpha` is 1 for sample, `-sigma` for v_prediction, `alpha_dot` for velocity, `sigma / sigma_data` for
    edm, its negative for edm_v, and 0 for epsilon and score: finite also where alpha = 0. It equals
    `eps_shift_to_output(eps(x) - eps(x'), ...)` wherever that is defined.

    Args:
        output: Network output at `x`, `(B, ...)`.
        other: Network output at `x'`, the same shape.
        offset: `(x' - x) / alpha`, the change of the clean data, the same shape.
        level: Resolved level of both, one for all or one per sample.
        kind: What the outputs mean; see `OUTPUTS`.
        sigma_data: EDM only.

    Returns:
        Shape of `output`, float32 or wider.

    Raises:
        ValueError: For an unknown kind, and for a velocity without `alpha_dot`.

    Example:
        >>> level, x = NoiseSchedule("flow", "velocity").resolve(500), torch.ones(1, 2)
        >>> output_difference(3 * x, 3 * x, 0.5 * x, level, "velocity")
        tensor([[-0.5000, -0.5000]])
    """
    wide = torch.promote_types(torch.promote_types(output.dtype, other.dtype), torch.float32)
    difference, offset = output.to(wide) - other.to(wide), offset.to(wide)
    if kind in ("epsilon", "score"):
        return difference
    if kind == "sample":
        return difference + offset
    if kind == "v_prediction":
        return difference - expand(level.sigma, offset) * offset
    if kind == "velocity":
        return difference + expand(level.alpha_dot, offset) * offset
    if kind in ("edm", "edm_v"):
        part = expand(level.sigma, offset) / sigma_data * offset
        return difference + part if kind == "edm" else difference - part
    raise ValueError(f"Unknown network output {kind!r}; known: {', '.join(OUTPUTS)}.")


def _divide(top: Tensor, bottom: float | Tensor, what: str, name: str) -> Tensor:
    if bool((bottom == 0).any()) if isinstance(bottom, Tensor) else bottom == 0:
        raise ValueError(
            f"{what} is undefined where {name} = 0; take another form of the prediction or another level."
        )
    return top / bottom


def _no_noise() -> Tensor:
    raise ValueError(
        "This network was trained on masked patches, not on noise: it has no eps, v, velocity or score. Take `x0`."
    )


class Prediction:
    """One network output in every form; each property is an exact conversion in float32 or wider.

    Attributes:
        output: The raw network output (after splitting off a learned variance), `(B, ...)`.
        x_t: What the network took.
        level: Resolved noise level.
        kind: What `output` means, one of `OUTPUTS`.
    """

    def __init__(self, output: Tensor, x_t: Tensor, level: NoiseLevel, schedule: NoiseSchedule) -> None:
        wide = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
        self.output, self.x_t, self.level, self.kind = output.to(wide), x_t.to(wide), level, schedule.output
        self._x0, self._eps = to_x0_eps(self.output, self.x_t, level, schedule.output, schedule.sigma_data)
        if schedule.kind == "patch_mask":
            self._eps = _no_noise

    @property
    def x0(self) -> Tensor:
        """Estimate of the clean data; ValueError where alpha = 0 and the network does not give it."""
        return self._x0()

    @property
    def eps(self) -> Tensor:
        """Estimate of the noise; ValueError where sigma = 0 and the network gives the clean data only."""
        return self._eps()

    @property
    def v(self) -> Tensor:
        """`alpha eps - sigma x_0` (Salimans and Ho 2022, arXiv 2202.00512)."""
        if self.kind == "v_prediction":
            return self.output
        return expand(self.level.alpha, self.x_t) * self.eps - expand(self.level.sigma, self.x_t) * self.x0

    @property
    def velocity(self) -> Tensor:
        """`alpha_dot x_0 + sigma_dot eps`, per unit time in [0, 1] (VE and EDM: time is `sigma / sigma_max`)."""
        if self.kind == "velocity":
            return self.output
        return expand(self.level.alpha_dot, self.x_t) * self.x0 + expand(self.level.sigma_dot, self.x_t) * self.eps

    @property
    def score(self) -> Tensor:
        """Gradient of the log density of `x_t`: `-eps / sigma`; ValueError where sigma = 0."""
        if self.kind == "score":
            return self.output
        return _divide(-self.eps, expand(self.level.sigma, self.x_t), "score", "sigma")
