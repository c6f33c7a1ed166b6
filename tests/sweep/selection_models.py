"""Networks whose layers show chosen rows of the image, so that a test knows where the label can be read."""

import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_repr import Denoiser, GenericFamily

SIDE = 8


class Rows(nn.Module):
    """The rows of the image as channels `(B, 8, 1, 8)`; those in `always` at any timestep, `planted` at one only."""

    def __init__(self, always=(), planted=(), timestep=None, fault=None):
        super().__init__()
        self.always, self.planted, self.timestep, self.fault = list(always), list(planted), timestep, fault
        self.work = nn.Conv2d(1, 1, 3, padding=1)  # for the FLOPs

    def forward(self, x, t):
        shown = torch.zeros(len(x), SIDE, device=x.device)
        shown[:, self.always] = 1
        if self.planted:
            shown[:, self.planted] = torch.where(t == self.timestep, 1.0, 0.0)[:, None].expand(-1, len(self.planted))
        self.work(x)
        out = (x[:, 0] * shown[:, :, None]).unsqueeze(2)
        return out if self.fault is None else out * self.fault


class Planted(nn.Module):
    """Layers by name, run in order."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.forwards = 0

    def forward(self, sample, timestep):
        self.forwards += sample.device.type != "meta"
        for layer in self.children():
            layer(sample, timestep)
        return sample


def planted(**layers):
    return Denoiser(Planted(**layers), DDPMScheduler(), family=GenericFamily(channels=1))


def striped(count, seed=0, classes=4, rows=(0, 2)):
    """`(images (n, 1, 8, 8), labels)`: the bits of the label are the brightness of `rows`; all else is random."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.arange(count) % classes
    for bit, row in enumerate(rows):
        bright = (labels >> bit) & 1
        images[:, 0, row] = 0.1 * images[:, 0, row] + 0.3 + 0.4 * bright[:, None]
    return images, labels
