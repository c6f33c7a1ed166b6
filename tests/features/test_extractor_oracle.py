"""The extractor against a plain loop, for every family."""

import hashlib

import pytest
import torch

from tests.features.extractor_cases import LAYERS, assert_close, images_for, make
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build

# The plain way: one image, one member, one level at a time; the whole forward; noise multiplied in float64.


def own_noise(pixels, member, shape, seed):
    key = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
    digest = hashlib.blake2b(f"{seed}|{key}|{member}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(*shape, generator=generator)


def own_coefficients(pipe, t):
    if "Flow" in type(pipe.scheduler).__name__ or pipe.scheduler.config.get("use_flow_sigmas"):
        return 1 - t / 1000, t / 1000
    bar = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)[t]
    return bar.sqrt().item(), (1 - bar).sqrt().item()


def own_latents(pipe, pixels):
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return pixels
    out = vae.encode(pixels)
    mean = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latent
    return (mean - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def recorded_call(pipe, model, name):
    """What the pipeline itself passes to its network, from a whole run of it."""
    calls = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    height, width = SIZES[name]
    call = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
    if name == "dit":
        call = {"num_inference_steps": 2, "output_type": "np"}
    if not name.startswith("flux"):
        call["guidance_scale"] = 1.0
    if name in ("pixart", "sana"):
        call["use_resolution_binning"] = False
    condition = CONDITIONS[name]
    if name == "dit":
        condition = {"class_labels": [condition["class_labels"]]}
    pipe(**condition, **call)
    handle.remove()
    return calls[0]


def own_forward(pipe, model, name, recorded, x_t, t):
    if name in ("ddpm", "ddim"):
        return model(x_t, t)
    if name == "class_unet":
        return model(x_t, t, class_labels=torch.tensor([CONDITIONS[name]["class_labels"]]))
    args, kwargs = recorded
    args, kwargs = list(args), dict(kwargs)
    if name.startswith("flux"):
        b, c, h, w = x_t.shape
        x_t = x_t.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    scaled = {"flux": t / 1000, "flux_guidance": t / 1000, "sana": t * model.config.get("timestep_scale", 1.0)}
    t = torch.tensor([scaled.get(name, t)])
    if args:
        args[0] = x_t
    else:
        kwargs["sample" if "sample" in kwargs else "hidden_states"] = x_t
    if len(args) > 1:
        args[1] = t
    else:
        kwargs["timestep"] = t
    return model(*args, **kwargs)


def image_part(name, module, output):
    if not isinstance(output, tuple):
        return output
    two_streams = {"JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}
    return output[1] if type(module).__name__ in two_streams else output[0]


@torch.no_grad()
def plain_features(pipe, name, layers, timesteps, images, members, seed=0):
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    text = name not in ("ddpm", "ddim", "class_unet")
    recorded = recorded_call(pipe, model, name) if text else None
    found = {layer: [] for layer in layers}
    for t in timesteps:
        for image in images:
            pixels = (2 * image - 1)[None]
            x0 = own_latents(pipe, pixels)
            total = {}
            for member in range(members):
                alpha, sigma = own_coefficients(pipe, t)
                noise = own_noise(pixels[0], member, x0.shape[1:], seed)
                x_t = (alpha * x0.double() + sigma * noise.double()).float()
                seen = {}
                handles = [
                    model.get_submodule(path).register_forward_hook(
                        lambda m, a, out, path=path, seen=seen: seen.__setitem__(
                            path, image_part(name, m, out).clone()
                        )
                    )
                    for path in layers
                ]
                own_forward(pipe, model, name, recorded, x_t, t)
                for handle in handles:
                    handle.remove()
                for path, value in seen.items():
                    total[path] = total.get(path, 0) + value[0].double()
            for path in layers:
                found[path].append((total[path] / members).float())
    return {path: torch.stack(rows).unflatten(0, (len(timesteps), len(images))) for path, rows in found.items()}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_equals_a_plain_loop(name):
    images, timesteps, members = images_for(name), [261, 40], 2
    condition = CONDITIONS[name]
    features = make(name, timestep=timesteps, ensemble_size=members, batch_size=3, seed=5)(images, **condition)
    plain = plain_features(build(name), name, LAYERS[name], timesteps, images, members, seed=5)
    for layer in LAYERS[name]:
        assert_close(features[layer], plain[layer])


@pytest.mark.parametrize("name", [n for n in PIPELINES if n != "dit"])
def test_maps_of_images_with_unequal_sides(name):
    """H != W: every layer lies as its image; a transposed grid would have the other shape."""
    output = make(name)(images_for(name), **CONDITIONS[name])
    height, width = SIZES[name]
    for layer in output.layers:
        h, w = output.as_map(layer).shape[2:]
        assert h * width == w * height


def test_dit_takes_square_images_only():
    with pytest.raises(ValueError, match="square images only.*32 x 48"):
        make("dit")(torch.rand(1, 3, 32, 48))
    with pytest.raises(ValueError, match="square images only"):
        make("dit", image_size=(32, 48))
