"""A network whose map moves with the image, and pairs whose truth is known."""

import functools

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from diffusers_repr import Denoiser, FeatureExtractor, GenericFamily
from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.tasks.correspondence import Correspondence

STRIDE = 4


class Patches(nn.Module):
    """Two layers without padding between cells: `sharp` a projection of patches of 4 x 4 pixels, `flat` their mean."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.sharp = nn.Conv2d(3, 24, STRIDE, STRIDE)
            self.flat = nn.Conv2d(3, 2, STRIDE, STRIDE)
        nn.init.constant_(self.flat.weight, 1.0)

    def forward(self, sample, timestep):
        self.sharp(sample)
        self.flat(sample)
        return sample


@functools.cache
def denoiser():
    return Denoiser(Patches().eval(), DDPMScheduler(), family=GenericFamily(channels=3))


def task(layer="sharp", image_size="keep", compared=None, **settings):
    settings = {"timestep": 10, "noise": "clean", **settings}
    return Correspondence(FeatureExtractor(denoiser(), layer, image_size=image_size, **settings), compared)


def photo(height=40, width=56, seed=0):
    """A picture without repeats: smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def shifted(image, x, y):
    """The image moved right by x and down by y, round the edges."""
    return Image.fromarray(np.roll(np.asarray(image), (y, x), (0, 1)))


def pairs():
    """Two targets, three pairs; the middle of cells, moved by whole cells."""
    one, two = photo(seed=1), photo(seed=2)
    points = torch.tensor([[9.5, 9.5], [21.5, 13.5], [33.5, 25.5]])
    moved = shifted(one, 8, 4)
    return ImagePairs.from_list(
        [
            (one, moved, points, points + torch.tensor([8.0, 4.0]), (0, 0, 40, 30)),
            (two, shifted(two, 4, 8), points[:1], points[:1] + torch.tensor([4.0, 8.0]), (0, 0, 20, 20)),
            (two, moved, points[:2], points[:2], (0, 0, 10, 10)),  # nothing belongs together: mostly wrong
        ]
    )
