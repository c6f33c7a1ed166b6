"""What DDAE's grid of linear probes tries: blocks of the decoder, and little noise."""

from __future__ import annotations

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.estimates import check_scheduler
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features.decoder_units import decoder_units
from diffusers_repr.features.presets import edm_sigma
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import LevelLike, NoiseLevel

_TIMESTEPS = (0, 10, 20)  # of DDPM in pixels: 1, 11 and 21 of the source, which counts from 1 (0 is no noise)
_EDM_INDICES = (3, 4, 5)  # of EDM's grid of 18
_LATENT_TIMESTEPS = (81, 121)  # of DiT: the published points of Tiny-ImageNet and CIFAR-10; the source has no grid


def ddae_layers(denoiser: Denoiser) -> list[str]:
    """The layers of DDAE's grid (arXiv 2303.09769), in execution order: `ddae_layers(denoiser)[k - 1]` is its `out_k`.

    Of a U-Net every residual block of the decoder, behind its attention where it has one. Up-samplers are not counted
    and not passed through: `up_blocks.i` itself, which ends with one, is none of them. `out_6` is another depth and
    another resolution in another network, so choose anew for each. Of a transformer every block; the source's
    `layer-k` counts from 0.

    Args:
        denoiser: Of any family.

    Raises:
        ValueError: For a network with neither up-blocks nor a stack of transformer blocks.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("AttnUpBlock2D", "UpBlock2D"))
        >>> ddae_layers(Denoiser(unet, DDPMScheduler()))[1:3]
        ['up_blocks.0.attentions.1', 'up_blocks.1.resnets.0']
    """
    require_images(denoiser, "DDAE's grid")
    model = plain_module(denoiser.model)
    paths = [path for stage in decoder_units(model) for path in stage]
    for stack in () if paths else denoiser.family.stacks:
        paths += [f"{stack}.{at}" for at in range(len(getattr(model, stack, None) or ()))]
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no up_blocks and no stack of transformer blocks; name layers of "
            "`list_layers(denoiser)`."
        )
    return paths


def ddae_levels(denoiser: Denoiser) -> list[LevelLike]:
    """The noise levels of DDAE's grid, least noisy first; of processes that it does not know, as much noise.

    Args:
        denoiser: In pixels: timesteps 0, 10 and 20 of DDPM's betas (1, 11 and 21 there, where 0 is no noise), points
            3 to 5 of EDM's grid of 18. In latents the two points it reads DiT at, 81 and 121.

    Raises:
        ValueError: For a network that was not trained for its scheduler, such as one of EDM without its
            preconditioning; one forward finds out.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> ddae_levels(Denoiser(unet, DDPMScheduler()))
        [0, 10, 20]
    """
    require_images(denoiser, "DDAE's grid")
    check_scheduler(denoiser)
    kind = denoiser.schedule.kind
    if kind == "edm":
        return [NoiseLevel(nsr=edm_sigma(index)) for index in _EDM_INDICES]
    timesteps = _TIMESTEPS if denoiser.vae is None else _LATENT_TIMESTEPS
    if kind == "vp" and denoiser.schedule.num_train_timesteps == 1000:
        return list(timesteps)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return [NoiseLevel(nsr=float((1 / alpha_bar[t] - 1).sqrt())) for t in timesteps]


__all__ = ["ddae_layers", "ddae_levels"]
