"""How far a network's noise estimate is from the noise that was added: one number a sample, in float32."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction

Loss = Literal["l2", "l1", "huber", "vlb"]
LOSSES: tuple[str, ...] = get_args(Loss)


def check_loss(kind: str) -> str:
    """The kind, if it is one; ValueError with those there are else."""
    if kind not in LOSSES:
        raise ValueError(f"loss={kind!r} is none that is known; take one of {', '.join(LOSSES)}.")
    return kind


def noise_error(eps: Tensor, noise: Tensor, kind: str) -> Tensor:
    """Mean over the elements of a distance between the estimated and the true noise, `(B,)` float32.

    Args:
        eps: Estimate `(B, ...)`.
        noise: What was added, the same shape.
        kind: `l2` (and `vlb`, whose weight is another matter): the square; `l1`: the absolute value; `huber`: half the
            square up to 1, linear beyond.

    Example:
        >>> noise_error(torch.full((1, 4), 3.0), torch.zeros(1, 4), "l2")
        tensor([9.])
    """
    eps, noise = eps.float(), noise.to(eps.device).float()
    if kind == "huber":
        values = functional.huber_loss(eps, noise, reduction="none")
    else:
        values = (eps - noise).abs() if check_loss(kind) == "l1" else (eps - noise).square()
    return values.flatten(1).mean(1)


def check_bound(denoiser: Denoiser) -> None:
    """Refuse the variational bound of a network that gives a variance beside the noise.

    Raises:
        ValueError: Its bound has a term for the variance, which the error of the noise does not hold.
    """
    channels = denoiser.family.channels()
    if denoiser.config.get("out_channels") == 2 * channels:
        raise ValueError(
            f"loss='vlb' is the bound of a fixed variance, and {denoiser.name or type(denoiser.model).__name__} has "
            f"learned its own ({2 * channels} channels out, {channels} in): its bound is another. Take loss='l2'."
        )


def bound_weight(level: NoiseLevel, schedule: NoiseSchedule) -> Tensor:
    """What the squared error of a level weighs in the variational bound, in bits per dimension.

    The mean of `weight * error` over levels drawn evenly is the bound without its ends. For a process of T steps a
    step's term is `1/2 (SNR(t-1) / SNR(t) - 1) |eps - eps_hat|^2`, with the variance of the posterior (Ho et al. 2020,
    eq. 8); the others take its limit, `1/2 d(log nsr^2)/dt` (Kingma et al. 2021, eq. 15). A network that learned its
    variance has another bound: see `check_bound`.

    Args:
        level: Resolved, one for all or one a sample.
        schedule: The process.

    Raises:
        ValueError: At timestep 0 of a process of T steps: its term is the decoder's.
    """
    if schedule.kind == "vp":
        time = torch.as_tensor(level.timestep, dtype=torch.float64)
        if bool((time < 1).any()):
            raise ValueError("loss='vlb' has no term below timestep 1, which is the decoder's; leave that level out.")
        before, now = (_half_log_snr(schedule, value) for value in (time - 1, time))
        return 0.5 * schedule.num_train_timesteps * torch.expm1(2 * (before - now)) / math.log(2)
    alpha, sigma, alpha_dot, sigma_dot = (
        torch.as_tensor(value, dtype=torch.float64)
        for value in (level.alpha, level.sigma, level.alpha_dot, level.sigma_dot)
    )
    return (sigma_dot / sigma - alpha_dot / alpha) / math.log(2)


def _half_log_snr(schedule: NoiseSchedule, time: Tensor) -> Tensor:
    return torch.as_tensor(schedule.resolve(time).half_log_snr, dtype=torch.float64)


def pair_error(prediction: Prediction, noise: Tensor, kind: str, schedule: NoiseSchedule) -> Tensor:
    """Error of each sample of one forward, `(B,)` float64 on the CPU, of a network of any kind of output.

    Args:
        prediction: Of the network; its estimate of the noise is an exact conversion.
        noise: What was added.
        kind: See `Loss`.
        schedule: The network's.
    """
    error = noise_error(prediction.eps, noise, kind).double().cpu()
    return error * bound_weight(prediction.level, schedule) if kind == "vlb" else error


__all__ = ["LOSSES", "Loss", "bound_weight", "check_bound", "check_loss", "noise_error", "pair_error"]
