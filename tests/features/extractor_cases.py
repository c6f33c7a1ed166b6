"""Extractors of every family on tiny models, their layers and images."""

import torch

from diffusers_repr import Denoiser, FeatureExtractor
from tests.testers.models import SIZES, build

LAYERS = {
    "ddpm": ["mid_block", "up_blocks.1"],
    "ddim": ["down_blocks.1", "up_blocks.1.resnets.0"],
    "class_unet": ["mid_block"],
    "sd": ["up_blocks.1", "up_blocks.2.attentions.0"],
    "sdxl": ["mid_block", "up_blocks.0.attentions.1"],
    "dit": ["transformer_blocks.1"],
    "pixart": ["transformer_blocks.0"],
    "sd3": ["transformer_blocks.0"],
    "flux": ["transformer_blocks.1", "single_transformer_blocks.0"],
    "flux_guidance": ["single_transformer_blocks.0"],
    "sana": ["transformer_blocks.1"],
}


def images_for(name, count=2, seed=0, size=None):
    channels = 1 if name == "ddpm" else 3
    return torch.rand(count, channels, *(size or SIZES[name]), generator=torch.Generator().manual_seed(seed))


def make(name, layers=None, timestep=261, **settings):
    """The images of these tests keep their size, which is none that a network was configured for."""
    layers = LAYERS[name] if layers is None else layers
    return FeatureExtractor(Denoiser.from_pipe(build(name)), layers, timestep, **{"image_size": "keep", **settings})


def assert_close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))
