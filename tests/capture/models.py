"""A tiny real denoiser of every family with the inputs of one forward, made once a process."""

import functools

import torch

from diffusers_repr.denoiser import Denoiser, list_layers
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build

NAMES = list(PIPELINES)


@functools.cache
def setting(name):
    """`(model, keyword inputs, layer table)`; two samples of unequal sides where the family takes them."""
    denoiser = Denoiser.from_pipe(build(name))
    return denoiser.model, inputs_of(denoiser, name), tuple(list_layers(denoiser, SIZES[name], detail="all"))


def inputs_of(denoiser, name):
    size, stride = SIZES[name], denoiser.stride
    low, high = denoiser.schedule.timestep_range
    level = denoiser.level(round(low + 0.261 * (high - low)))
    with torch.no_grad():
        condition = denoiser.condition(**CONDITIONS[name], batch=2, size=size)
    shape = (2, denoiser.family.channels(), size[0] // stride, size[1] // stride)
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return denoiser.network_inputs(x_t, level, condition.kwargs())


def hook_count(model):
    """Forward hooks of every kind on every module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
