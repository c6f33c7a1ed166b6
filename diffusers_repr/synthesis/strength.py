"""Image to image with any pipeline that starts from given noise: the sampler begins inside its schedule.

The pipelines of diffusers for image to image are those of text models; this is the same for the others: of N steps the
last `int(strength * N)` are taken, from the image noised to the level of the first of these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.sampling import check_number
from diffusers_repr.hub.checks import check_whole

# Samplers whose step asks for nothing but its timestep, or for its place by `set_begin_index`: multistep ones count
# the steps of the whole schedule, and would end too early or too late.
SAMPLERS = ("DDIMScheduler", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler")


def truncated_steps(steps: int, strength: float) -> int:
    """Number of steps that are taken, `int(steps * strength)`, as in the pipelines of diffusers.

    Args:
        steps: Of the whole schedule.
        strength: From 0, which leaves the image as it is, to 1.

    Raises:
        TypeError: For what is no number.
        ValueError: For a strength outside of [0, 1], and fewer steps than one.
    """
    check_whole("num_inference_steps", steps)
    return min(int(steps * check_number("strength", strength, 0, 1)), steps)


@contextmanager
def starting_inside(denoiser: Denoiser, steps: int, strength: float) -> Iterator[float]:
    """Inside, the denoiser's pipeline takes the last steps alone; gives the timestep of the first of them.

    Args:
        denoiser: With a pipeline, which is called with `num_inference_steps=steps` inside.
        steps: Of the whole schedule.
        strength: Share of them.

    Raises:
        ValueError: For a sampler that is none of `SAMPLERS`, no step left, and as `truncated_steps`.
    """
    pipe, kept = denoiser.pipe, truncated_steps(steps, strength)
    assert pipe is not None
    whole = pipe.scheduler
    if type(whole).__name__ not in SAMPLERS:
        raise ValueError(
            f"Image to image takes {', '.join(SAMPLERS)}, which can start inside their schedule; this pipeline has "
            f"{type(whole).__name__}. Take another by --scheduler."
        )
    if not kept:
        raise ValueError(f"strength={strength} of {steps} steps leaves none to be taken; the image stays as it is.")
    inside = copy.deepcopy(whole)
    start = (steps - kept) * getattr(inside, "order", 1)

    def set_timesteps(*given: Any, **named: Any) -> None:
        type(inside).set_timesteps(inside, *given, **named)
        inside.timesteps = inside.timesteps[start:]
        if hasattr(inside, "set_begin_index"):
            inside.set_begin_index(start)

    inside.set_timesteps = set_timesteps
    probe = copy.deepcopy(whole)
    probe.set_timesteps(steps)
    pipe.scheduler = inside
    try:
        yield float(probe.timesteps[start])
    finally:
        pipe.scheduler = whole


def noised_start(denoiser: Denoiser, pixels: Tensor, timestep: float, noise: Tensor) -> Tensor:
    """What a pipeline gets as `latents` to go on from images noised to a level.

    Args:
        denoiser: Its denoiser.
        pixels: `(B, C, H, W)` in [-1, 1].
        timestep: Of `starting_inside`.
        noise: Standard normal, of the shape of x_0.
    """
    x0 = denoiser.encode_pixels(pixels)
    x_t = denoiser.add_noise(x0.float(), timestep, noise.to(x0.device))
    assert denoiser.pipe is not None
    return x_t / float(getattr(denoiser.pipe.scheduler, "init_noise_sigma", 1.0))


def own_noise(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    """Standard normal noise `(B, *shape)`, of each row by its own seed, on the CPU."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


__all__ = ["SAMPLERS", "noised_start", "own_noise", "starting_inside", "truncated_steps"]
