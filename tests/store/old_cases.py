"""What the folders in `tests/data/old` were made of; whole numbers over 64, so that any machine has them."""

from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

OLD = Path(__file__).parents[1] / "data" / "old"
CLASSES = [2, 0, 1, 0, 2]


def filled(module):
    """A module whose weights are small, unequal and the same everywhere."""
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            steps = torch.arange(parameter.numel()) * 7 + place * 3
            parameter.copy_((steps % 33 - 16).reshape(parameter.shape) / 64)
    return module.eval()


def images():
    paths = [str(OLD / f"repa/images/00000/img{row:08d}.png") for row in range(len(CLASSES))]
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "emu"])})
    return Dataset.from_dict({"image": paths, "label": CLASSES}, features=features)


def vae():
    return filled(
        AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=2,
            sample_size=8,
            scaling_factor=0.5,
        )
    )


def pipeline():
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    return DDPMPipeline(filled(network), DDPMScheduler())


def teacher_module():
    return filled(nn.Conv2d(3, 4, 4, stride=4))


EXTRACTION = {"layers": ["mid_block", "up_blocks.1"], "timestep": [100, 261], "batch_size": 2}
