"""Tiny SiT pipelines, and their samplers written out as loops in float64."""

import math

import torch
from diffusers import AutoencoderKL
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr.models.sit import SiTTransformer2DModel

CLASSES = 5


def network(seed=0, **changes):
    """A network whose every weight acts: a new one gives 0 and hides all."""
    settings = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16}
    settings |= {"num_attention_heads": 2, "num_classes": CLASSES, **changes}
    model = SiTTransformer2DModel(**settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def autoencoder(**changes):
    """Two pixels a latent pixel."""
    torch.manual_seed(0)
    settings = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    settings |= {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(**settings, **changes).eval()


def pipeline(scheduler=None, vae=None, id2label=None, **changes):
    """A silent pipeline; latent if there is a VAE."""
    if vae is not None:
        changes = {"in_channels": 4, **changes}
    pipe = SiTPipeline(network(**changes), scheduler or FlowMatchODEScheduler(), vae=vae, id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count=2, channels=3, seed=0, dtype=torch.float64):
    """Noise to start from."""
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def path(name, t):
    """`alpha, sigma, alpha_dot, sigma_dot`."""
    if name == "linear":
        return 1 - t, t, -1.0, 1.0
    half = math.pi / 2
    return math.cos(half * t), math.sin(half * t), -half * math.sin(half * t), half * math.cos(half * t)


def guided(model, x, t, labels, scale, on):
    """The velocity, guided or not, by a call for each lane."""
    times = torch.full((len(x),), 1000 * t, dtype=torch.float64)
    cond = model(x, times, labels).sample
    if not on:
        return cond
    null = model(x, times, torch.full_like(labels, CLASSES)).sample
    return scale * cond + (1 - scale) * null


@torch.no_grad()
def ode_loop(model, x, labels, steps, heun=False, scale=1.0, low=0.0, high=1.0):
    """Euler's or Heun's method on an even grid from 1 to 0; guidance as at the start of a step."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        on = scale > 1 and low <= t <= high
        u = guided(model, x, t, labels, scale, on)
        if heun and i < steps - 1:
            u = (u + guided(model, x + dt * u, grid[i + 1], labels, scale, on)) / 2
        x = x + dt * u
    return x


@torch.no_grad()
def sde_loop(model, x, labels, steps, generator, name="linear", scale=1.0, low=0.0, high=1.0):
    """Euler-Maruyama in the score, w = 2 t, with a last step without noise."""
    grid = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    for i in range(steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        alpha, sigma, alpha_dot, sigma_dot = path(name, t)
        u = guided(model, x, t, labels, scale, scale > 1 and low <= t <= high)
        score = -(alpha * u - alpha_dot * x) / (alpha * sigma_dot - alpha_dot * sigma) / sigma
        x = x + (u - t * score) * dt
        if i < steps - 1:
            x = x + math.sqrt(2 * t * -dt) * torch.randn(x.shape, generator=generator).double()
    return x
