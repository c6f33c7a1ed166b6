"""Tiny models for sweeps: a network whose layers are known functions of the image, and encoders."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn
from transformers import ViTConfig, ViTModel

from diffusers_repr import Denoiser
from diffusers_repr.encoders import Encoder
from tests.sweep.selection_models import SIDE, Rows, planted


class ImageRows(nn.Module):
    """The rows of the image as channels, `(B, 8, 1, 1)`: one patch an image."""

    def forward(self, pixels):
        return pixels[:, 0].mean(2)[:, :, None, None]


def rows_encoder():
    return Encoder.from_module(ImageRows(), patch_size=SIDE, channels=1, name="rows")


def rows_denoiser():
    """Layers that show all rows, some of them, and nothing."""
    return planted(all=Rows(range(SIDE)), few=Rows([0, 1]), none=Rows())


def images(count, seed=0, side=SIDE):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet2DModel(
            SIDE,
            1,
            1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    return Denoiser(model, DDPMScheduler())


def vit(folder):
    """A folder with a tiny vision transformer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=SIDE,
            patch_size=4,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)
