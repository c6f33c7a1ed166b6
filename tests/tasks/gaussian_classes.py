"""A class-conditional denoiser in closed form: each class is normal, so that the Bayes classifier is known."""

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.conditioner.labels import LabelConditioner
from diffusers_repr.denoiser.family_registry import family_by_name
from diffusers_repr.noise import NoiseSchedule, training_target

SIDE, WIDTH = 4, 0.2


def means(classes=4, seed=0):
    """(K, 1, SIDE, SIDE) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(classes, 1, SIDE, SIDE, generator=generator, dtype=torch.float64) - 0.5


class GaussianClasses(nn.Module):
    """Of data `N(mean_c, width^2)` the best estimate of the noise, in any form of prediction."""

    def __init__(self, centres, scheduler, trained_as=None):
        super().__init__()
        self.config = {"num_class_embeds": len(centres), "in_channels": 1, "out_channels": 1, "sample_size": SIDE,
                       "block_out_channels": (8,)}  # fmt: skip
        self.centres = nn.Parameter(centres.clone())
        self.schedule = NoiseSchedule.from_scheduler(scheduler)
        self.trained_as = trained_as or self.schedule

    def forward(self, sample, timestep, class_labels):
        level = self.schedule.resolve(timestep.double().expand(len(sample)))
        a, s = (value.double().view(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
        centre = self.centres[class_labels]
        residual = (sample.double() - a * centre) / (a**2 * WIDTH**2 + s**2)
        eps, x0 = s * residual, centre + a * WIDTH**2 * residual
        if self.trained_as.output == "epsilon":
            return (eps,)
        return (training_target(x0, eps, level, self.trained_as),)


def denoiser(kind="epsilon", centres=None, trained_as=None):
    """A `Denoiser` in float64; `kind`: a prediction type, `flow`, `edm`; `trained_as`: a schedule it does not have."""
    others = {"flow": FlowMatchEulerDiscreteScheduler(), "edm": EDMEulerScheduler(sigma_data=1.0)}
    scheduler = others[kind] if kind in others else DDPMScheduler(prediction_type=kind)
    model = GaussianClasses(means() if centres is None else centres, scheduler, trained_as)
    family = family_by_name("UNet2DModel")
    return Denoiser(model, scheduler, family=family, conditioner=LabelConditioner(-1), name="gaussian")


def draw(count, seed=1, centres=None, width=WIDTH):
    """`(x0, labels)`, float64."""
    centres = means() if centres is None else centres
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(centres)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return centres[labels] + width * noise, labels


def photos(x0):
    """x0 as images are passed: float32 in [0, 1]."""
    return ((x0.clamp(-1, 1) + 1) / 2).float()
