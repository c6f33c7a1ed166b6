"""Analytic denoisers in every form of prediction, twins of one network, and loops written by hand."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from diffusers_repr.denoiser import Denoiser, GenericFamily
from diffusers_repr.noise import NoiseSchedule, sampler_level


def as_output(schedule: NoiseSchedule, x0, x, level):
    """An estimate of x0 at a level, in the schedule's own form of prediction."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    eps = (x - alpha * x0) / sigma
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "velocity": eps - x0,
    }[schedule.output]


class Recast(nn.Module):
    """A network of x0, read in another form of prediction: twins differ by `scheduler.config.prediction_type` alone.

    The conversion is at the level at which the scheduler stands, which is the timestep's up to its rounding.
    """

    def __init__(self, x0: nn.Module, scheduler):
        super().__init__()
        self.x0, self.scheduler, self.schedule = x0, scheduler, NoiseSchedule.from_scheduler(scheduler)

    def forward(self, sample, timestep, **condition):
        x0 = self.x0(sample, timestep, **condition)
        x0 = (x0 if isinstance(x0, torch.Tensor) else x0[0]).double()
        level = sampler_level(self.scheduler, timestep, self.schedule).level
        return as_output(self.schedule, x0, sample.double(), level).to(sample.dtype)


class Mixture(nn.Module):
    """Exact eps of a mixture of Gaussians `N(means[k], std^2 I)` over all elements of a sample.

    With a label k the component alone, with label K (the null) or none the whole mixture; K = 1 is a Gaussian.
    """

    def __init__(self, schedule: NoiseSchedule, means, std=0.5, weights=None):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("means", torch.as_tensor(means).double())
        self.std = std
        weights = torch.ones(len(self.means)) / len(self.means) if weights is None else torch.as_tensor(weights)
        self.register_buffer("logits", weights.double().log())

    def forward(self, sample, timestep, labels=None):
        level = self.schedule.resolve(float(torch.as_tensor(timestep).flatten()[0]))
        alpha, sigma = float(level.alpha), float(level.sigma)
        x = sample.double()
        x0 = (x - sigma * self.exact(x, alpha, sigma, labels)) / alpha
        return as_output(self.schedule, x0, x, level).to(sample.dtype)

    def exact(self, x, alpha, sigma, labels=None):
        """eps `(B, C, H, W)` at `x = alpha x0 + sigma eps`, in the dtype of x."""
        variance = (alpha * self.std) ** 2 + sigma**2
        away = x[:, None] - alpha * self.means.to(x.dtype)  # B, K, C, H, W
        logits = self.logits.to(x.dtype) - away.flatten(2).square().sum(2) / (2 * variance)
        if labels is not None:
            own = torch.arange(len(self.means)) == labels[:, None]
            whole = labels[:, None] == len(self.means)
            logits = logits.masked_fill(~(own | whole), -torch.inf)
        return sigma / variance * (logits.softmax(1)[..., None, None, None] * away).sum(1)


class Linear(nn.Module):
    """eps = x W over the channels of each pixel, the same at all levels."""

    def __init__(self, channels=3, seed=0):
        super().__init__()
        weight = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight / channels**0.5)

    def forward(self, sample, timestep):
        return torch.einsum("bchw,cd->bdhw", sample, self.weight)


class Counter:
    """Rows of every forward of a module, as hooks see them; extra passes by `.forward` are seen at a submodule."""

    def __init__(self, module: nn.Module):
        self.rows: list[int] = []
        self._handle = module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
        self.rows.append(next(tensors).shape[0])

    @property
    def calls(self) -> int:
        return len(self.rows)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


def toy_means(channels=3, size=4, components=2, seed=0):
    """Means `(K, C, H, W)` of a mixture."""
    return torch.randn(components, channels, size, size, generator=torch.Generator().manual_seed(seed))


def toy_denoiser(model: nn.Module, scheduler, channels=3) -> Denoiser:
    """A Denoiser of any network called as `(sample, timestep, **condition)`."""
    return Denoiser(model, scheduler, family=GenericFamily(channels=channels))


def noise(*shape, seed=0, dtype=torch.float32):
    """Seeded Gaussian noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def sample(model, scheduler, x, steps=4, seed=0, **condition):
    """The loop of an unconditional pipeline, written out: `model(sample=, timestep=, **condition)` gives a tensor."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in takes else {}
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = model(sample=given, timestep=t.expand(len(x)), **condition)
        out = out if isinstance(out, torch.Tensor) else out[0]
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x
