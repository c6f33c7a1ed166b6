"""Which parameters of a network some of its layers depend on: the others are not trained by losses of these layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.layers import on_meta

_ROWS = 2


def reached_parameters(denoiser: Denoiser, layers: Sequence[str]) -> set[str]:
    """Names of the parameters that a gradient of the layers reaches, found on the meta device: nothing is computed.

    Args:
        denoiser: Of any family.
        layers: Full module paths.

    Raises:
        ValueError: For layers that do not exist or never run.
    """
    family, schedule = denoiser.family, denoiser.schedule
    model = on_meta(denoiser.model).eval()
    model.requires_grad_(True)
    x_t = torch.empty(_ROWS, family.channels(), *denoiser.latent_size(denoiser.image_size), device="meta")
    level = schedule.resolve(sum(schedule.timestep_range) / 2)
    inputs = family.inputs(x_t, level, family.example(_ROWS, "meta"))
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.enable_grad(), capture(model, layers) as tape:
        model(**inputs)
    parameters = dict(model.named_parameters())
    total = torch.stack([value.float().sum() for value in tape.features.values()]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


__all__ = ["reached_parameters"]
