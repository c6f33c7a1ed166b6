"""Data `N(MEAN, STD^2)`, whose velocity, and so every step of a sampler, is affine and known in closed form."""

import math

import torch

MEAN, STD = 0.7, 0.4


def path(name, t):
    """`alpha, sigma, alpha_dot, sigma_dot`, written apart from the schedulers."""
    if name == "linear":
        return 1 - t, t, -1.0, 1.0
    angle = t * math.pi / 2
    return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)


def parts(name, t, x):
    """Exact velocity and score at x."""
    alpha, sigma, alpha_dot, sigma_dot = path(name, t)
    score = -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x0 = MEAN - alpha * STD**2 * score
    return alpha_dot * x0 - sigma_dot * sigma * score, score


def velocity(name):
    """The network of this data, called as `(x, timestep)`."""
    return lambda x, timestep: parts(name, float(timestep) / 1000, x)[0]


def run(scheduler, network, x, steps=None, **options):
    """The loop of a pipeline; returns all states."""
    scheduler.set_timesteps(steps)
    states = [x]
    for t in scheduler.timesteps:
        states.append(scheduler.step(network(states[-1], t), t, states[-1], **options).prev_sample)
    return states


def starts(count=256, seed=0, dtype=torch.float64):
    """Standard normal starts `(count, 1)`."""
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)
