"""What diffusion autoencoders learn of the 8x8 digits in some hundred steps; long, so all are slow."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_repr import Denoiser
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.models import SemanticEncoder
from diffusers_repr.objectives import DiffusionAutoencoderObjective, DiffusionObjective, PenaltyConfig

pytestmark = pytest.mark.slow

BATCH, DIM = 128, 16  # those of the method's own numbers, which the bounds are widened from by a fifth


@pytest.fixture(scope="module")
def digits():
    found = load_digits_splits()
    return {name: to_pixels(list(found[name]["image"]), 1) for name in ("train", "test")}


def encoder(**changes):
    settings = {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "standardize_features": True,
    }
    return SemanticEncoder(1, DIM, 8, **settings, **changes)


def unet():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(8, 1, 1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                       attention_head_dim=16, resnet_time_scale_shift="scale_shift", **blocks)  # fmt: skip


def new_denoiser():
    return Denoiser.from_pipe(DDPMPipeline(unet(), DDPMScheduler()))


def train(objective, images, steps, seed=0, end=1.0):
    """`end` is the share of the rate that the last step has."""
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(objective.param_groups()[0]["params"], lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, steps)
    objective.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=drawn)
        optimizer.zero_grad()
        objective({"pixel_values": images[rows]})["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    objective.eval()


def trained(objective, images, steps, **how):
    train(objective, images, steps, **how)
    (artifact,) = objective.artifacts()
    pipe = artifact.build(objective.state_dict())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def errors(denoiser, images, conditions=(None,)):
    """Of the noise, at levels over the whole range, by each condition."""
    t = torch.arange(len(images)) * 1000 // len(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    x_t = denoiser.add_noise(images, t, noise)
    found = [denoiser.predict(x_t, t, one).eps for one in conditions]
    return [float((eps - noise).square().mean()) for eps in found]


def errors_by_code(pipe, images):
    """With the own code, another image's, and none beside a base."""
    code = pipe.encode(images / 2 + 0.5, None).code
    codes = [code, code.roll(1, 0), *([None] if pipe.gradient is not None else [])]
    return errors(pipe.denoiser, images, [pipe.condition(one, len(images)) for one in codes])


def distance(pipe, images, code, noise, steps=50):
    back = pipe.decode(code, noise, steps, torch.Generator().manual_seed(2), output_type="latent").images
    return float((back - images).square().mean())


def test_diffae_uses_its_code(digits):
    torch.manual_seed(0)
    made = DiffusionAutoencoderObjective(new_denoiser(), encoder(), modulation="scale")
    pipe, images = trained(made, digits["train"], 300), digits["test"]
    own, permuted = errors_by_code(pipe, images)
    assert permuted > own + 0.032
    pipe = trained(made, digits["train"], 300, seed=1)  # 600 in all
    torch.manual_seed(0)
    plain = new_denoiser()
    train(DiffusionObjective(plain), digits["train"], 600)
    (alone,) = errors(plain, images)
    own, permuted = errors_by_code(pipe, images)
    assert own < alone < permuted
    images, inferred = images[:64], {}
    code = pipe.encode(images / 2 + 0.5, None).code
    for steps in (50, 100):
        noise = pipe.encode(images / 2 + 0.5, steps).x_T
        inferred[steps] = distance(pipe, images, code, noise, steps), float(noise.std())
    assert inferred[50][0] > 2 * inferred[100][0]
    assert inferred[50][1] < inferred[100][1] < 1.1
    random = distance(pipe, images, code, None, 100)
    wrong = distance(pipe, images, code.roll(1, 0), noise, 100)
    assert inferred[100][0] < random / 4
    assert random < 0.8 * wrong


def test_infodiffusion_keeps_codes_normal(digits):
    pipes = {}
    for penalty in ("none", "mmd"):
        torch.manual_seed(0)
        made = DiffusionAutoencoderObjective(new_denoiser(), encoder(), PenaltyConfig(penalty=penalty))
        pipes[penalty] = trained(made, digits["train"], 400, end=0.0)  # or the kept mean of features lags behind
    pipe = pipes["mmd"]
    code = pipe.encode(digits["train"] / 2 + 0.5, None).code
    assert float(code.mean(0).abs().mean()) < 0.24
    assert 0.56 < float(code.var(0).mean()) < 1.44
    assert float(torch.linalg.eigvalsh(code.T.cov())[-1]) < 3
    own, permuted = errors_by_code(pipe, digits["test"])
    assert own < permuted
    assert own < 1.1 * errors_by_code(pipes["none"], digits["test"])[0]


def test_pdae_closes_the_gap_of_its_base(digits):
    torch.manual_seed(0)
    base = Denoiser.from_pretrained("examples/models/digits-ddpm", dtype=torch.float32)
    made = DiffusionAutoencoderObjective(base, encoder(), PenaltyConfig(weighting="snr"), frozen_base=True)
    pipe = trained(made, digits["train"], 300)
    own, permuted, frozen = errors_by_code(pipe, digits["test"])
    assert own < 0.9 * frozen
    assert frozen < permuted
    pipe = trained(made, digits["train"], 300, seed=1)  # 600 in all
    images = digits["test"][:64]
    code = pipe.encode(images / 2 + 0.5, None).code
    start = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    told = distance(pipe, images, code, start, 100)
    without = pipe(code=code, latents=start, num_inference_steps=100, gradient_stop=1.0, output_type="latent").images
    assert 3.3 * told < float((without - images).square().mean())
