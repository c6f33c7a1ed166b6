"""What a network should return for a noisy input, in every form of prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.noise.conversions import expand
from diffusers_repr.noise.level import NoiseLevel
from diffusers_repr.noise.schedule import NoiseSchedule


def training_target(x0: Tensor, noise: Tensor, level: NoiseLevel, schedule: NoiseSchedule) -> Tensor:
    """The regression target of a network whose output has the form `schedule.output`.

    With `x_t = a x_0 + s eps`: `eps`, `x_0`, `a eps - s x_0` (Salimans and Ho 2022, arXiv 2202.00512),
    `a_dot x_0 + s_dot eps` (Lipman et al. 2022, arXiv 2210.02747), or F of Karras et al. 2022 (arXiv 2206.00364,
    eq. 8), which is `s x_0 / d - d a eps` for data of standard deviation `d`.

    Args:
        x0: Clean data (B, ...).
        noise: Standard normal, shape of `x0`.
        level: Resolved, one for all or one per sample.
        schedule: The process and the output's form.

    Returns:
        Shape of `x0`, float32 or wider.

    Raises:
        ValueError: For a score network: its target `-eps / s` is unbounded; train another form.

    Example:
        >>> schedule = NoiseSchedule("flow", "velocity")
        >>> training_target(torch.ones(1, 2), torch.zeros(1, 2), schedule.resolve(250), schedule)
        tensor([[-1., -1.]])
    """
    wide = torch.promote_types(x0.dtype, torch.float32)
    x0, noise = x0.to(wide), noise.to(wide)
    kind = schedule.output
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "velocity":
        return expand(level.alpha_dot, x0) * x0 + expand(level.sigma_dot, x0) * noise
    a, s = expand(level.alpha, x0), expand(level.sigma, x0)
    if kind == "v_prediction":
        return a * noise - s * x0
    if kind in ("edm", "edm_v"):
        d = schedule.sigma_data
        target = s * x0 / d - d * a * noise
        return target if kind == "edm" else -target
    raise ValueError(f"No bounded target for a network that returns the {kind}; train one that returns epsilon.")
