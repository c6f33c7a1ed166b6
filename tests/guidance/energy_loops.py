"""Sampling loops written out by hand, guided by an energy of one layer: the oracle of `EnergyGuidance`."""

import copy
from types import SimpleNamespace

import numpy as np
import torch

STEPS = 3


def weights_of(shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def as_map(tokens, grid):
    return tokens if tokens.ndim == 4 else tokens.transpose(1, 2).unflatten(2, grid)


def energy(feature):
    """Of a map `(B, C, h, w)`; other weights for every entry."""
    return (torch.sin(feature) * weights_of(feature.shape[1:]).to(feature)).sum((1, 2, 3))


def setup(pipe, name, scale, count):
    """What a hand-written loop needs: start, schedule, network call under a condition, read-out of a layer."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    scheduler = copy.deepcopy(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    height, width = {"dit": (16, 16)}.get(name, (16, 24))
    with torch.no_grad():
        if name == "sd":
            cond, null = pipe.encode_prompt(["a cat"] * count, "cpu", 1, scale > 1)
            inputs = [{"encoder_hidden_states": value} for value in (cond, null)]
        elif name == "sd3":
            cond, null, pooled, null_pooled = pipe.encode_prompt(
                "a cat", None, None, do_classifier_free_guidance=scale > 1, num_images_per_prompt=count
            )
            inputs = [
                {"encoder_hidden_states": a, "pooled_projections": b} for a, b in ((cond, pooled), (null, null_pooled))
            ]
        elif name == "dit":
            inputs = [{"class_labels": torch.full((count,), label)} for label in (207, 1000)]
        else:
            cond, pooled, ids = pipe.encode_prompt("a cat", None, num_images_per_prompt=count)
            rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
            places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(cond)
            own = {"encoder_hidden_states": cond, "pooled_projections": pooled, "txt_ids": ids, "img_ids": places}
            inputs = [own, own]
    latents = torch.randn(count, 4, height, width, generator=generator)
    if name == "flux":
        latents = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        # As the pipeline packs: the channels of a token are (C, 2, 2), as those of pixel_unshuffle.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    else:
        scheduler.set_timesteps(STEPS)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    key = "sample" if name == "sd" else "hidden_states"

    def network(x, t, condition):
        told = t.expand(len(x))
        told = told / 1000 if name == "flux" else told
        return model(**{key: x}, timestep=told, **condition, return_dict=False)[0]

    return SimpleNamespace(
        model=model, scheduler=scheduler, latents=latents, network=network, cond=inputs[0], null=inputs[1], count=count
    )


def features(run, layer, grid, x, t, index=None):
    """The layer's map in a forward with the condition."""
    kept = {}

    def keep(module, args, output):
        kept["value"] = output if index is None else output[index]

    handle = run.model.get_submodule(layer).register_forward_hook(keep)
    try:
        prediction = run.network(x, t, run.cond)
    finally:
        handle.remove()
    return as_map(kept["value"], grid), prediction


def sigma_of(scheduler, t, step):
    """sigma and alpha of what the network takes, and the network's input over the scheduler's state."""
    name = type(scheduler).__name__
    if name == "DDIMScheduler":
        bar = scheduler.alphas_cumprod[int(t)]
        return (1 - bar).sqrt(), bar.sqrt(), 1.0
    sigma = scheduler.sigmas[step]
    if name.startswith("FlowMatch"):
        return sigma, 1 - sigma, 1.0
    alpha = 1 / (sigma**2 + 1).sqrt()
    return sigma * alpha, alpha, alpha if name.startswith("Euler") else 1.0


def sample(run, layer, grid, update, rate, scale, index=None):
    """Latents after all steps."""
    latents, scheduler = run.latents, run.scheduler
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        x = scaled.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            found, _ = features(run, layer, grid, x, t, index)
            (g,) = torch.autograd.grad(energy(found).sum(), x)
        sigma, alpha, ratio = sigma_of(scheduler, t, step)
        shift = torch.zeros_like(scaled)
        if update == "latent_sign":
            shift = -rate * g.sign()
        elif update == "latent_adam":
            x = torch.nn.Parameter(scaled.clone())
            optimizer = torch.optim.Adam([x], lr=rate)
            x.grad = g
            optimizer.step()
            shift = x.detach() - scaled
        with torch.no_grad():
            output = run.network(scaled + shift, t, run.cond)
            channels = 4 if output.ndim == 4 else output.shape[2]
            output = output[:, :channels] if output.ndim == 4 else output
            if scale > 1:
                null = run.network(scaled + shift, t, run.null)[:, :channels]
                output = null + scale * (output - null)
            if update == "eps" and alpha > 0:
                change = rate * sigma * g
                if type(scheduler).__name__.startswith("FlowMatch"):
                    change = change / alpha  # velocity = eps - x0, x0 = (x - sigma eps) / alpha
                output = output + change
            latents = scheduler.step(output, t, latents + shift / ratio, return_dict=False)[0]
    return latents
