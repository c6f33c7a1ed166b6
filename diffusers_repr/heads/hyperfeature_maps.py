"""Maps of layers along a DDIM inversion, handed on one by one as they come; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.capture.caches import refuse_caches
from diffusers_repr.denoiser import Condition, DDIMStep, Denoiser, ddim_invert, ddim_levels
from diffusers_repr.noise import NoiseLevel, NoiseSchedule

Receive = Callable[[int, str, Tensor], None]


def paper_reads(steps: int) -> list[int]:
    """The steps at which Diffusion Hyperfeatures reads: of 50, number 0 and then every fifth from 4 to 49.

    Of another number the same places, in proportion.

    Example:
        >>> paper_reads(50), paper_reads(1), paper_reads(10)
        ([0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49], [0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    return sorted({min(steps - 1, max(0, (n * steps) // 10 - 1)) for n in range(11)})


def walk_levels(
    schedule: NoiseSchedule, steps: int, reads: Sequence[int], clean_timestep: float | None = None
) -> list[NoiseLevel]:
    """The levels from the clean image to the last one that is read: step n evaluates the network at number n."""
    return ddim_levels(schedule, steps, clean_timestep)[: max(reads) + 1]


@torch.no_grad()
def walk_maps(
    denoiser: Denoiser,
    x0: Tensor,
    condition: Condition | Mapping[str, Any] | None,
    layers: Sequence[str],
    steps: int,
    reads: Sequence[int],
    receive: Receive,
    clean_timestep: float | None = None,
) -> None:
    """Invert images and hand on the maps of layers at some of the steps.

    The last step that is read ends with its last layer.

    Args:
        denoiser: Of any family.
        x0: From `denoiser.encode`, `(B, C, h, w)`.
        condition: For `denoiser.predict`.
        layers: Full module paths.
        steps: As in `ddim_levels`.
        reads: Numbers of the steps that are read, 0 being the clean image.
        receive: `(place, path, maps)`: which of `reads`, which layer, and `(B, C_l, h_l, w_l)` without a gradient, in
            the network's dtype, in the order in which the network makes them. Called without recording gradients.
        clean_timestep: As in `ddim_levels`.

    Raises:
        ValueError: For layers that do not exist or give no map, a network with caches, and as `ddim_invert`.
    """
    refuse_caches(denoiser.model, "so features would hold features of other calls")
    levels, size = walk_levels(denoiser.schedule, steps, reads, clean_timestep), tuple(x0.shape[2:])
    places = {step: place for place, step in enumerate(reads)}
    now = 0

    def hand_on(value: Tensor, path: str) -> None:
        if now in places:
            receive(places[now], path, denoiser.feature_map(path, value, size).as_map())

    def advance(step: DDIMStep) -> None:
        nonlocal now
        now = step.index + 1

    last = levels[-1]
    if len(levels) > 1:
        with capture(denoiser.model, layers, stop_early=False, transform=hand_on):
            state = ddim_invert(denoiser, x0, condition=condition, levels=levels, callback=advance)
    else:
        state = last.alpha * x0
    with denoiser.evaluating(), capture(denoiser.model, layers, transform=hand_on):
        denoiser.predict(state.to(denoiser.dtype), last, condition)


__all__ = ["paper_reads", "walk_levels", "walk_maps"]
