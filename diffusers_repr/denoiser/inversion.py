"""DDIM both ways: an image to noise along its own trajectory and back; nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.condition import Condition
from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction
from diffusers_repr.noise.conversions import expand

_RHO = 7.0  # of the grid of EDM and VE, Karras et al. 2022, eq. 5


@dataclass(frozen=True)
class DDIMStep:
    """One step of a walk, as its callback gets it.

    Attributes:
        index: Counts from 0, in the direction of the walk.
        level: Where the network was evaluated.
        after: Where the step ends.
        x_t: The state before the step, float32 or wider: what the network took.
        prediction: Of the network there.
        state: The state after the step.
    """

    index: int
    level: NoiseLevel
    after: NoiseLevel
    x_t: Tensor
    prediction: Prediction
    state: Tensor


Callback = Callable[[DDIMStep], None]


def ddim_levels(schedule: NoiseSchedule, steps: int = 50, clean_timestep: float | None = None) -> list[NoiseLevel]:
    """The levels that a walk of `steps` visits, from the clean image up: `steps + 1` of them.

    `vp`: the clean image, then timesteps 0, T // steps, 2 (T // steps), ... (diffusers' `leading` spacing, offset 0).
    Flows: evenly spaced from 0 to T, where a step is Euler's on the linear path. `edm` and `ve`: the clean image, then
    Karras' grid from `sigma_min` to `sigma_max`.

    Args:
        schedule: The network's process, `denoiser.schedule`.
        steps: Network calls of a walk.
        clean_timestep: What the network is told of the clean image. None: -1 for `vp`, as in DDIM's code (outside of
            what it was trained on; 0 is the smallest that it knows), the smallest timestep of the others.

    Raises:
        ValueError: For fewer steps than one or more than there are timesteps.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> levels = ddim_levels(NoiseSchedule.from_scheduler(DDIMScheduler()), 50)
        >>> [int(level.timestep) for level in (*levels[:3], levels[-1])], levels[0].sigma
        ([-1, 0, 20, 980], 0.0)
    """
    total = schedule.num_train_timesteps
    if schedule.kind in ("flow", "cosine_flow"):
        check_whole("steps", steps)
        if clean_timestep is not None:
            raise ValueError(
                f"clean_timestep={clean_timestep}, but timestep 0 of a {schedule.kind} is the clean image."
            )
        return [schedule.resolve(total * n / steps) for n in range(steps + 1)]
    if schedule.kind == "vp":
        check_whole("steps", steps, high=total)
        noisy = [schedule.resolve(n * (total // steps)) for n in range(steps)]
        told = -1.0 if clean_timestep is None else float(clean_timestep)
        return [schedule.clean_level(told), *noisy]
    check_whole("steps", steps)
    low, high = (s ** (1 / _RHO) for s in (schedule.sigma_min, schedule.sigma_max))
    grid = [(low + (high - low) * n / max(steps - 1, 1)) ** _RHO for n in range(steps)]
    noisy = [schedule.resolve(NoiseLevel(nsr=min(max(s, schedule.sigma_min), schedule.sigma_max))) for s in grid]
    told = schedule.timestep_range[0] if clean_timestep is None else float(clean_timestep)
    return [schedule.clean_level(told), *noisy]


def ddim_update(prediction: Prediction, after: NoiseLevel) -> Tensor:
    """The state at another level: `alpha' x_0 + sigma' eps` of one prediction (Song et al. 2020, eq. 12, eta = 0).

    Args:
        prediction: At the level where the state is.
        after: Resolved level; noisier to invert, less noisy to generate.

    Returns:
        float32 or wider, the shape of the state.
    """
    state = prediction.x_t
    return expand(after.alpha, state) * prediction.x0 + expand(after.sigma, state) * prediction.eps


@torch.no_grad()
def ddim_invert(
    denoiser: Denoiser,
    x0: Tensor,
    steps: int = 50,
    condition: Condition | Mapping[str, Any] | None = None,
    *,
    levels: Sequence[NoiseLevel] | None = None,
    refine: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Walk from images to noise; `ddim_generate` walks back.

    Each step takes the network's estimate where the state is, not where it goes: the way back differs by an error that
    falls with the number of steps. With `refine` the step is solved for the state from which generation comes back.

    Args:
        denoiser: Of any family and prediction.
        x0: Images or latents `(B, ...)`, from `denoiser.encode`; the state at the first of `levels` if that has noise.
        steps: See `ddim_levels`.
        condition: As for `Denoiser.predict`; of guidance there is none.
        levels: What is visited, in place of `steps`, from less to more noise.
        refine: Fixed-point iterations a step, one network call each (the implicit step of AIDI, arXiv 2309.04907).
        callback: Called after each step; nothing of it is kept.

    Returns:
        The state at the last level, float32 or wider.

    Raises:
        ValueError: For levels in another order, and a network that predicts clean images, whose noise estimate at
            the clean image is undefined.
    """
    visited = _visited(denoiser, steps, levels)
    check_whole("refine", refine, 0)
    first = visited[0]
    if first.sigma == 0 and denoiser.schedule.output == "sample":
        raise ValueError(
            "This network predicts clean images: of an image without noise it tells no noise to go on with. Start at "
            "a level: levels=ddim_levels(denoiser.schedule, steps)[1:], with x_t there."
        )
    x = _wide(x0) * (first.alpha if first.sigma == 0 else 1)
    with denoiser.evaluating():
        for index, (level, after) in enumerate(pairwise(visited)):
            found = _predict(denoiser, x, level, condition)
            y = ddim_update(found, after)
            for _ in range(refine):
                # The y with x = alpha x_0(y) + sigma eps(y), where x_0(y) = (y - sigma' eps(y)) / alpha'.
                eps = _predict(denoiser, y, after, condition).eps
                y = after.alpha / level.alpha * (x - level.sigma * eps) + after.sigma * eps
            if callback is not None:
                callback(DDIMStep(index, level, after, x, found, y))
            x = y
    return x


@torch.no_grad()
def ddim_generate(
    denoiser: Denoiser,
    x_t: Tensor,
    steps: int = 50,
    condition: Condition | Mapping[str, Any] | None = None,
    *,
    levels: Sequence[NoiseLevel] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Walk from noise to images along the same levels, without noise of its own and without clipping.

    Args:
        denoiser: As in `ddim_invert`.
        x_t: The state at the noisiest level, `(B, ...)`.
        steps: As there.
        condition: As there.
        levels: As there: from less to more noise; they are visited from the end.
        callback: As there.

    Returns:
        x_0 if the first level is clean, else the state there; float32 or wider.

    Raises:
        ValueError: As `ddim_invert`; for a prediction that is undefined at a level.
    """
    visited = _visited(denoiser, steps, levels)[::-1]
    x, last = _wide(x_t), visited[-1]
    with denoiser.evaluating():
        for index, (level, after) in enumerate(pairwise(visited)):
            found = _predict(denoiser, x, level, condition)
            y = ddim_update(found, after)
            if callback is not None:
                callback(DDIMStep(index, level, after, x, found, y))
            x = y
    return x / last.alpha if last.sigma == 0 else x


def inversion_error(
    denoiser: Denoiser,
    x0: Tensor,
    steps: int = 50,
    condition: Condition | Mapping[str, Any] | None = None,
    *,
    levels: Sequence[NoiseLevel] | None = None,
    refine: int = 0,
) -> Tensor:
    """Mean squared difference `(B,)` between images and what comes back of them: the error of the steps.

    Args:
        denoiser: As in `ddim_invert`.
        x0: As there.
        steps: As there.
        condition: As there.
        levels: As there.
        refine: As there.
    """
    noise = ddim_invert(denoiser, x0, steps, condition, levels=levels, refine=refine)
    back = ddim_generate(denoiser, noise, steps, condition, levels=levels)
    return (back - _wide(x0)).square().flatten(1).mean(1)


def _visited(denoiser: Denoiser, steps: int, levels: Sequence[NoiseLevel] | None) -> list[NoiseLevel]:
    require_denoiser(denoiser)
    visited = ddim_levels(denoiser.schedule, steps) if levels is None else [denoiser.level(one) for one in levels]
    shares = [one.nsr if one.nsr is not None else one.sigma / one.alpha for one in visited]
    if any(isinstance(share, Tensor) for share in shares) or any(a >= b for a, b in pairwise(shares)):
        raise ValueError(f"levels go from less to more noise, one for all samples; got {list(visited)}.")
    if len(visited) < 2:
        raise ValueError(f"A walk needs two levels at least; got {len(visited)}.")
    return visited


def _predict(denoiser: Denoiser, x: Tensor, level: NoiseLevel, condition: Any) -> Prediction:
    """The network takes its own dtype; the state is not rounded to it."""
    raw = denoiser.predict(x.to(denoiser.dtype), level, condition)
    return Prediction(raw.output, x, level, denoiser.schedule)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


__all__ = ["DDIMStep", "ddim_generate", "ddim_invert", "ddim_levels", "ddim_update", "inversion_error"]
