"""`untrained`: a model as it was before training, the baseline that tells what training brought; other networks."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.hub.compiled import plain_module


def untrained(denoiser: Denoiser, seed: int = 0) -> Denoiser:
    """The same network with the random weights that it starts training from; all around it is shared.

    Args:
        denoiser: The trained model, which stays as it is.
        seed: Of the weights; torch's global random state is left alone.

    Returns:
        A `Denoiser` without a name: nothing can be loaded that has these weights.

    Raises:
        TypeError: For a network that has no config to be made from.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> fresh = untrained(Denoiser(unet, DDPMScheduler()), seed=1)
        >>> torch.equal(fresh.model.conv_in.weight, unet.conv_in.weight)
        False
    """
    model = plain_module(denoiser.model)
    make = getattr(type(model), "from_config", None)
    if make is None:
        raise TypeError(f"A {type(model).__name__} has no config from which it could be made anew.")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        fresh = make(model.config).eval()
    fresh.to(next(model.parameters()).device)
    if fresh.dtype != denoiser.dtype:
        fresh.to(dtype=denoiser.dtype)
    return with_network(denoiser, fresh)


def with_network(denoiser: Denoiser, network: nn.Module) -> Denoiser:
    """The same denoiser with another network of its class; all around it is shared.

    Args:
        denoiser: Which stays as it is.
        network: On its device and of its dtype.

    Returns:
        A `Denoiser` without a name: nothing that can be loaded has these weights.
    """
    pipe, model = copy.copy(denoiser.pipe), plain_module(denoiser.model)
    if pipe is not None:
        slot = next(name for name, part in pipe.components.items() if part in (denoiser.model, model))
        setattr(pipe, slot, network)
    family, schedule = denoiser.family, denoiser.schedule
    return Denoiser(network, denoiser.scheduler, denoiser.vae, pipe=pipe, family=family, schedule=schedule)


__all__ = ["untrained", "with_network"]
