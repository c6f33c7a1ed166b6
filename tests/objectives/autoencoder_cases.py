"""Diffusion autoencoders at toy size, with weights that all act."""

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers_repr.pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline

from diffusers_repr import Denoiser
from diffusers_repr.models import FiLM, GradientUNet, SemanticEncoder, film_blocks
from diffusers_repr.objectives import DiffusionAutoencoderObjective, PenaltyConfig
from tests.objectives.cases import shake

D = 6
STAGES = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
EXACT = DDIMScheduler(clip_sample=False)


def unet(time="scale_shift", **changes) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    settings = {**STAGES, **blocks, "resnet_time_scale_shift": time, **changes}
    return shake(UNet2DModel(8, 1, 1, **settings), std=0.1).eval()


def text_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    settings = {**STAGES, **blocks, "cross_attention_dim": 12, **changes}
    return shake(UNet2DConditionModel(8, 4, 4, **settings), std=0.1).eval()


def denoiser(network=None, scheduler=None) -> Denoiser:
    return Denoiser.from_pipe(DDPMPipeline(network or unet(), scheduler or DDPMScheduler()))


def encoder(channels=1, size=8, **changes) -> SemanticEncoder:
    torch.manual_seed(1)
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8, **changes}
    return SemanticEncoder(channels, D, size, **settings)


def objective(kind="diffae", base=None, standardize_features=False, **penalty) -> DiffusionAutoencoderObjective:
    """One of `diffae`, `infodiffusion`, `kl`, `pdae`."""
    base = denoiser(base, None) if base is None or isinstance(base, torch.nn.Module) else base
    given = {"diffae": {}, "infodiffusion": {"penalty": "mmd"}, "kl": {"penalty": "kl"}, "pdae": {"weighting": "snr"}}
    settings = PenaltyConfig(**{**given[kind], **penalty})
    how = {"variational": settings.penalty == "kl", "standardize_features": standardize_features}
    own = encoder(base.image_channels, base.image_size[0], **how)
    modulation = "scale" if kind == "diffae" else "scale_shift"
    return DiffusionAutoencoderObjective(base, own, settings, frozen_base=kind == "pdae", modulation=modulation)


def acting(made: DiffusionAutoencoderObjective) -> DiffusionAutoencoderObjective:
    """With a modulation and an output of the gradient network that are not 0."""
    shake(made.film, 3)
    if made.gradient is not None:
        shake(made.gradient.unet.conv_out, 4)
    return made


def images(count=3, channels=1, size=8, seed=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def codes(count=3, seed=5):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def pipeline(kind="diffae", **changes) -> DiffusionAutoencoderPipeline:
    """Every weight acts; `kind` as in `objective`."""
    network = unet()
    gradient = shake(GradientUNet.of(network), 4, 0.1).eval() if kind == "pdae" else None
    film = FiLM(D, film_blocks(network if gradient is None else gradient.unet))
    parts = {"encoder": encoder(variational=kind == "kl").eval(), "film": shake(film, 3, 0.1).eval(), "unet": network,
             "gradient": gradient, "scheduler": EXACT}  # fmt: skip
    pipe = DiffusionAutoencoderPipeline(**{**parts, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe
