"""Small heads on small networks, and gradients of their losses computed by hand."""

import torch
from diffusers import DDIMScheduler

from diffusers_repr import Denoiser, NoiseLevel, guide
from diffusers_repr.heads import DepthHead, ReadoutHead, read_features, readout_layers
from diffusers_repr.heads.dense.features import tap_channels
from diffusers_repr.heads.dense.record import describe_base
from tests.testers.models import CONDITIONS, SIZES, unet2d

AT = 300
TARGET = torch.linspace(-0.8, 0.8, 6)[:, None].expand(6, 9)


SMALL = {"width": 8, "bottleneck": 4, "output_widths": (8, 4), "time_width": 16}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bare(channels=2, dtype=torch.float64, **changes):
    """A small U-Net of images that predicts noise, without condition."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = unet2d(channels, **changes).to(dtype).eval()
    return Denoiser(unet, DDIMScheduler(clip_sample=False))


_CHANNELS = {}  # of a base's layers; finding them takes longer than a sampled image


def _seeded(make, denoiser, layers, dtype, **options):
    """As `make.for_base`, with seeded weights."""
    layers = layers or readout_layers(denoiser.model)
    base = describe_base(denoiser)
    place = (base["base_fingerprint"], *layers)
    if place not in _CHANNELS:
        _CHANNELS[place] = tap_channels(denoiser, layers)
    given = {"level_range": denoiser.schedule.timestep_range, **base, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = make(layers=layers, channels=_CHANNELS[place], **given)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # also what starts at 0 and 1
    return head.to(dtype or denoiser.dtype)


def readout(denoiser, kind="spatial", layers=None, dtype=None, **options):
    return _seeded(ReadoutHead, denoiser, layers, dtype, kind=kind, **{**SMALL, **options})


def depth(denoiser, layers, dtype=None, **options):
    return _seeded(DepthHead, denoiser, layers, dtype, **{"hidden": (8, 6), "time_width": 16, **options})


def read(denoiser, head, x, timestep, condition=None, size=None):
    """Readout of x_t without gradient."""
    maps = read_features(denoiser, x, timestep, condition, list(head.config["layers"]))
    with torch.no_grad():
        return head(maps, timestep, size)


def gradient(denoiser, layers, loss, x, timestep):
    """Gradient of `loss(maps)` with respect to x_t, by plain autograd through the whole network."""
    kept, handles = {}, []
    for path in layers:

        def keep(module, args, output, path=path):
            kept[path] = output

        handles.append(denoiser.model.get_submodule(path).register_forward_hook(keep))
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        denoiser.predict(x, timestep)
        for handle in handles:
            handle.remove()
        maps = {path: denoiser.feature_map(path, value, tuple(x.shape[2:])).as_map() for path, value in kept.items()}
        (found,) = torch.autograd.grad(loss(maps).sum(), x)
    return found


def slope(value, x, count=5, step=1e-6):
    """Directions and the central differences of `value(x)` along them, by steps too short to meet kinks of ReLUs."""
    ways = normal(count, *x.shape, seed=9)
    rises = [(value(x + step * way) - value(x - step * way)) / (2 * step) for way in ways]
    return ways.flatten(1), torch.tensor(rises, dtype=torch.float64)


def hooks_of(model):
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def images(pipe, name, count=1, guidance_scale=None, steps=4, **kwargs):
    """Latents, or images of pixel models and of DiT, at equal seeds."""
    arguments = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    if name in ("ddpm", "ddim", "class_unet"):
        arguments |= {"batch_size": count, "output_type": "np"}
    elif name == "dit":
        arguments |= {"class_labels": [CONDITIONS[name]["class_labels"]] * count, "output_type": "np"}
    else:
        height, width = SIZES[name]
        arguments |= {"prompt": "a cat", "height": height, "width": width, "output_type": "latent"}
        arguments |= {"num_images_per_prompt": count}
    if name in ("pixart", "sana"):
        arguments["use_resolution_binning"] = False
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    return torch.as_tensor(pipe(**{**arguments, **kwargs}).images)


def train(denoiser, head, labels, steps, rate=1e-2, batch=8, shape=(4, 16, 16)):
    """Fit a spatial head to `labels(x_0)` of random smooth x_0, one random level a sample."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(head.parameters(), rate)
    for _ in range(steps):
        x0 = smooth(batch, shape, generator)
        low, high = head.config["level_range"]
        times = (low + (high - low) * torch.rand(batch, generator=generator)).round()
        level = denoiser.level(NoiseLevel(timestep=times))
        x_t = denoiser.add_noise(x0, level, torch.randn(x0.shape, generator=generator))
        maps = read_features(denoiser, x_t, level, None, list(head.config["layers"]))
        found = head(maps, level.timestep)
        loss = (found - torch.nn.functional.interpolate(labels(x0), found.shape[2:], mode="area")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def smooth(count, shape, generator=None):
    """Random images without small structure, about in [-1, 1]."""
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(-2, 2) / 2


def eps_gradient(denoiser, config, x, at=AT):
    """What `update="eps"` adds to the network's output, over scale and sigma."""
    with torch.no_grad():
        plain = denoiser.model(x, at).sample
        with guide(denoiser, config.replace(update="eps", scale=1e3)) as handle:
            guided = denoiser.model(x, at).sample
    return (guided - plain) / (1e3 * denoiser.level(at).sigma), handle.stats


def stepped(denoiser):
    """The scheduler of a loop that stands at `AT` among other steps."""
    denoiser.scheduler.set_timesteps(10)
    return denoiser.scheduler


def seen_inputs(denoiser, config, x, at=AT):
    """What the network takes in the pass whose output counts, under a guidance."""
    seen = []
    hook = denoiser.model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad(), guide(denoiser, config, scheduler=stepped(denoiser)):
        denoiser.model(x, at)
    hook.remove()
    return seen[-1]
