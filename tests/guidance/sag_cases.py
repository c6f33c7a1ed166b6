"""Self-attention guidance written out (the whole attention map, loops, float64), and networks to try it on."""

import numpy as np
import torch

from tests.testers.models import build, unet2d

MID = "mid_block.attentions.0"
SD_MID = f"{MID}.transformer_blocks.0.attn1"


def full_map(module, hidden):
    """`(B, heads, T, T)` of an attention module for its input, query by query."""
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    if module.group_norm is not None:
        tokens = module.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    query, key = module.to_q(tokens), module.to_k(tokens)
    batch, length, width = query.shape
    size = width // module.heads
    found = torch.zeros(batch, module.heads, length, length, dtype=torch.float64)
    for sample in range(batch):
        for head in range(module.heads):
            own = slice(head * size, (head + 1) * size)
            for at in range(length):
                scores = (key[sample, :, own] * query[sample, at, own]).sum(-1).double().numpy() / size**0.5
                weights = np.exp(scores - scores.max())
                found[sample, head, at] = torch.tensor(weights / weights.sum())
    return found


def nearest(received, size):
    """`(B, h, w)` -> `(B, 1, H, W)`, each pixel from its token."""
    batch, h, w = received.shape
    out = torch.zeros(batch, 1, *size, dtype=received.dtype)
    for y in range(size[0]):
        for x in range(size[1]):
            out[:, 0, y, x] = received[:, y * h // size[0], x * w // size[1]]
    return out


def blurred(image, sigma, kernel_size):
    """The two-dimensional kernel over an image that numpy has padded."""
    reach = kernel_size // 2
    padded = np.pad(image.double().numpy(), [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    height, width = image.shape[2:]
    out, total = np.zeros(image.shape), 0.0
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            weight = np.exp(-0.5 * (i * i + j * j) / sigma**2)
            total += weight
            out += weight * padded[:, :, reach + i : reach + i + height, reach + j : reach + j + width]
    return torch.from_numpy(out / total)


def degraded(x0, eps, received, level, *, sigma=1.0, kernel_size=9, threshold=1.0, clip=None):
    """x~ from the estimates, the attention received `(B, h, w)`, and `(alpha, sigma)`."""
    mask = nearest((received > threshold).double(), x0.shape[2:])
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return level[0] * (mask * blurred(x0, sigma, kernel_size) + (1 - mask) * x0) + level[1] * eps


def guided_eps(network, module, x, level, grid, scale, to_x0_eps=None, **settings):
    """`eps + s (eps - eps(x~))`.

    Args:
        network: x -> its output.
        module: Whose attention is read.
        x: What the network takes.
        level: alpha and sigma of it.
        grid: Of the tokens.
        scale: s.
        to_x0_eps: `(output, x) -> (x0, eps)`; a network of eps by default.
        settings: Of `degraded`.
    """
    alpha, sigma = level
    read = to_x0_eps or (lambda output, x: ((x - sigma * output) / alpha, output))
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    output = network(x)
    handle.remove()
    received = full_map(module, seen[0]).mean(1).sum(1).unflatten(1, grid)
    x0, eps = read(output, x)
    other = degraded(x0, eps, received, level, **settings)
    return eps + scale * (eps - read(network(other), other)[1])


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def sharpened(model, by=6.0):
    """Attention that differs between tokens: queries and keys of a fresh network are small."""
    for name, parameter in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.mul_(by)
    return model.eval()


@torch.no_grad()
def randomised(model, std=0.2, seed=0):
    """For networks whose output starts at zero or at little."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return model.double().eval()


def pixel_model(channels=2, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = unet2d(channels, **changes)
    return sharpened(model.double())


def sd_model(name="sd"):
    pipe = build(name)
    sharpened(pipe.unet)
    return pipe


def latents_of(pipe, steps=3, **kwargs):
    kwargs = {"prompt": "a photo of a cat", "height": 32, "width": 48, **kwargs}
    found = pipe(**kwargs, generator=torch.Generator().manual_seed(1), num_inference_steps=steps, output_type="latent")
    return found.images


def level_of(scheduler, timestep):
    bar = torch.cumprod(1 - scheduler.betas.double(), 0)[timestep]
    return float(bar.sqrt()), float((1 - bar).sqrt())
