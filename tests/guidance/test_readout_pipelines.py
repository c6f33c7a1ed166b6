"""ReadoutGuidance in whole pipelines: nearer to the target, with every family, beside others, in half precision."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_repr import CFG, PAG, Denoiser, ReadoutGuidance, guide
from diffusers_repr.guidance.readout.base import resize_target
from tests.guidance.readout_cases import (
    TARGET,
    bare,
    eps_gradient,
    hooks_of,
    images,
    normal,
    read,
    readout,
    train,
)
from tests.testers.models import build


def bright(x0):
    return x0.mean(1, keepdim=True).mul(1.5).clamp(-1, 1)


LAST = {"ddim": "up_blocks.2.resnets.1.conv2", "sd": "up_blocks.3.resnets.2.conv2", "dit": "transformer_blocks.2"}


@pytest.mark.parametrize(("name", "guidance_scale"), [("ddim", None), ("sd", 4.0), ("dit", 4.0)])
def test_samples_come_nearer_to_the_target(name, guidance_scale):
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    denoiser.prompts = {}
    head = readout(denoiser, layers=[LAST[name]], width=16, bottleneck=8)
    length = (
        {"steps": 40, "batch": 8} if name == "dit" else {"steps": 16, "batch": 4}
    )  # a DiT is quick, and learns less
    train(denoiser, head, bright, **length, shape=(3 if name == "ddim" else 4, 16, 16))
    target = torch.full((16, 16), -0.6)
    target[:, 8:] = 0.6

    def sample():
        seen = []
        if name == "dit":
            hook = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        found = images(
            pipe,
            name,
            2,
            guidance_scale,
            steps=6 if name == "dit" else 4,
            **({"height": 32, "width": 32} if name == "sd" else {}),
        )
        if name == "dit":
            hook.remove()
            return seen[0] * pipe.vae.config.scaling_factor
        return found if name == "sd" else found.permute(0, 3, 1, 2) * 2 - 1

    def error(x):
        r = read(denoiser, head, x, 20)
        return (r - resize_target(target[None, None], tuple(r.shape[2:]))).square().mean((1, 2, 3))

    plain = error(sample())
    updates = {"latent_sign": 0.2} if name != "dit" else {"latent_sign": 0.2, "latent_adam": 0.2, "eps": 100.0}
    for update, scale in updates.items():
        with guide(pipe, ReadoutGuidance(head, target, scale=scale, update=update)):
            guided = error(sample())
        assert bool((guided < 0.9 * plain).all()), (update, guided, plain)
    assert hooks_of(denoiser.model) == 0


@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl", "pixart", "sd3", "flux", "sana"])
def test_every_family_with_a_reference(name):
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    head = readout(denoiser, "appearance")
    plain = images(pipe, name, 2, steps=2)
    size = {"ddpm": (16, 16), "sdxl": (8, 12), "sana": (8, 16)}.get(name, (16, 24))
    x0 = torch.randn(denoiser.family.channels(), *size, generator=torch.Generator().manual_seed(2))
    with guide(pipe, ReadoutGuidance(head, reference=x0, scale=0.1)) as handle:
        guided = images(pipe, name, 2, steps=2)
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-3
    assert all(step.backward_passes == 1 for step in handle.stats.steps)
    assert hooks_of(denoiser.model) == 0


def test_beside_other_guidances():
    pipe = build("sd")
    head = readout(Denoiser.from_pipe(pipe))
    configs = [
        CFG(3.0),
        PAG(2.0),
        ReadoutGuidance(head, TARGET),
        ReadoutGuidance(head, -TARGET, update="eps", scale=9),
    ]
    with guide(pipe, configs) as handle:
        found = images(pipe, "sd", 1, 3.0, steps=1)
    assert found.isfinite().all()
    assert len(handle.stats.steps[0].acted) >= 3
    assert handle.stats.steps[0].backward_passes == 2


def test_a_scaled_sampler_and_half_precision():
    pipe = build("sd")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    head = readout(Denoiser.from_pipe(pipe))
    plain = images(pipe, "sd", 1, 1.0, steps=2)
    with guide(pipe, ReadoutGuidance(head, TARGET, scale=0.1)):
        assert (images(pipe, "sd", 1, 1.0, steps=2) - plain).abs().max() > 1e-2
    halved = build("sd").to(torch.bfloat16)
    assert next(head.parameters()).dtype == torch.float32
    with guide(halved, ReadoutGuidance(head, TARGET, scale=0.1)):
        assert images(halved, "sd", 1, 1.0, steps=1).isfinite().all()


def test_checkpoints_give_the_same_gradient():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    config = ReadoutGuidance(readout(denoiser, layers=["up_blocks.1"]), TARGET)
    plain, _ = eps_gradient(denoiser, config, x)
    denoiser.model.train()
    again, _ = eps_gradient(denoiser, config.replace(checkpoint=True), x)
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-14)
