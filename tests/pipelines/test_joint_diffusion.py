"""`JointDiffusionPipeline`: plain sampling as stock pipelines, guidance as written out, files, offload, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr.capture import encode_partial
from diffusers_repr.guidance.activations import steer
from diffusers_repr.heads import JointHead
from diffusers_repr.hub import check_pipeline_file
from diffusers_repr.models import JointViTModel
from tests.testers.models import unet2d

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "owl"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind="unet", scheduler=None) -> JointDiffusionPipeline:
    torch.manual_seed(0)
    if kind == "unet":
        unet = unet2d(1).eval()
        parts = {"unet": unet, "classifier": JointHead.for_unet(unet, 3, id2label=NAMES).eval()}
    else:
        vit = JointViTModel((16, 8), 4, 1, 2, 16, 2, num_classes=3, id2label=NAMES).eval()
        with torch.no_grad():
            vit.proj_out.weight.mul_(0.1)
            for block in vit.blocks:
                block.modulation.weight.normal_(std=0.2)
        parts = {"unet": vit}
    pipe = JointDiffusionPipeline(scheduler=scheduler or DDIMScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **settings):
    settings = {"num_inference_steps": 4, "output_type": "pt", "generator": seeded(), **settings}
    return pipe(**settings).images


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_without_guidance_it_is_the_stock_pipeline(scheduler):
    ours = make(scheduler=scheduler())
    stock = {DDPMScheduler: DDPMPipeline, DDIMScheduler: DDIMPipeline}[scheduler](ours.unet, scheduler())
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(ours, batch_size=3, output_type="np"), sample(stock, batch_size=3, output_type="np"))
    generators = [[seeded(1), seeded(2)] for _ in range(2)]
    want = sample(stock, batch_size=2, generator=generators[0], output_type="np")
    assert np.array_equal(sample(ours, batch_size=2, generator=generators[1], output_type="np"), want)
    (a,), (b,) = sample(ours, output_type="pil"), sample(stock, output_type="pil")
    assert a.tobytes() == b.tobytes()
    if scheduler is DDIMScheduler:
        for extra in ({"eta": 0.7}, {"use_clipped_model_output": True}):
            assert np.array_equal(sample(ours, output_type="np", **extra), sample(stock, output_type="np", **extra))


@pytest.mark.parametrize("kind", ["unet", "vit"])
def test_guidance_of_scale_0_is_none(kind):
    pipe, calls = make(kind), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = sample(pipe, batch_size=2)
    assert torch.equal(sample(pipe, class_labels=["dog", "owl"], guidance_scale=0.0), plain)
    assert calls == [False] * 8
    guided = sample(pipe, class_labels=["dog", "owl"], guidance_scale=20.0)
    assert (guided - plain).abs().max() > 1e-4
    assert torch.equal(sample(pipe, batch_size=2), plain)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("normalization", [None, "none", "relative", "sigma"])
def test_guidance_of_a_unet_is_written_out(normalization):
    """A sampler's loop around `steer`, with the scale of each step."""
    pipe, x = make(), torch.randn(2, 1, 16, 16, generator=seeded(4))
    labels, scheduler = torch.tensor([1, 2]), DDIMScheduler()
    got = sample(pipe, class_labels=labels, guidance_scale=5.0, latents=x, guidance_normalization=normalization,
                 output_type="latent")  # fmt: skip
    scheduler.set_timesteps(4)
    kind = "relative" if normalization == "relative" else "none"
    with torch.no_grad(), steer(pipe.unet, pipe.classifier, labels, 5.0, kind) as steering:
        for t in scheduler.timesteps:
            if normalization == "sigma":
                steering.scale = 5.0 * (1 - scheduler.alphas_cumprod[t].item()) ** 0.5
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_guidance_of_a_vit_is_written_out():
    pipe, x = make("vit"), torch.randn(2, 1, 16, 8, generator=seeded(4))
    labels, scheduler = torch.tensor([1, 2]), DDIMScheduler()
    got = sample(pipe, class_labels=labels, guidance_scale=3.0, latents=x, output_type="latent")
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        leaf = x.clone().requires_grad_(True)
        out = pipe.unet(leaf, t)
        log_p = out.logits.log_softmax(1)[torch.arange(2), labels].sum()
        (gradient,) = torch.autograd.grad(log_p, leaf)
        sigma = (1 - scheduler.alphas_cumprod[t]) ** 0.5
        x = scheduler.step(out.sample.detach() - 3.0 * sigma * gradient, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler,
                                       FlowMatchEulerDiscreteScheduler])  # fmt: skip
@pytest.mark.parametrize("kind", ["unet", "vit"])
def test_any_scheduler(kind, scheduler):
    pipe = make(kind, scheduler())
    one = sample(pipe, class_labels="dog", guidance_scale=5.0, batch_size=2, output_type="latent")
    assert one.isfinite().all()
    again = sample(pipe, class_labels=[1, 1], guidance_scale=5.0, output_type="latent")
    assert torch.equal(one, again)
    if kind == "unet":
        sample(pipe, class_labels="dog", guidance_scale=5.0, guidance_normalization="sigma")


@pytest.mark.parametrize("kind", ["unet", "vit"])
def test_classify(kind):
    pipe = make(kind)
    images = torch.rand(3, 1, 16, 8, generator=seeded(1))
    size = {"image_size": (16, 8)}  # half of what the U-Net has learned, by consent
    found = pipe.classify(images, **size)
    with torch.no_grad():
        if kind == "vit":
            logits = pipe.unet(2 * images - 1).logits
        else:
            x0 = (2 * images - 1) * (1 - 1e-4) ** 0.5
            features = encode_partial(pipe.unet, x0, torch.zeros(3, dtype=torch.long))
            logits = pipe.classifier(features.hidden, features.skips, 0)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probabilities, F.softmax(logits, 1), rtol=1e-5, atol=1e-6)
    assert found.class_labels.tolist() == logits.argmax(1).tolist()
    assert found.names == [NAMES[i] for i in found.class_labels]
    assert pipe.labels == NAMES
    as_pil = [pipe.numpy_to_pil(x.permute(1, 2, 0).numpy()[None])[0] for x in images]
    torch.testing.assert_close(pipe.classify(as_pil, **size).logits, found.logits, atol=0.05, rtol=0.05)
    pipe.unet.train()  # dropout or not, classification is that of evaluation
    assert torch.equal(pipe.classify(images, **size).logits, found.logits)
    assert pipe.unet.training


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_counterfactual(scheduler):
    pipe, images = make(scheduler=scheduler()), torch.rand(2, 1, 16, 16, generator=seeded(1))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"num_inference_steps": 10, "output_type": "pt"}
    got = pipe.counterfactual(images, ["dog", "owl"], 0.5, 20.0, generator=seeded(), **settings).images
    assert len(calls) == 5
    again = pipe.counterfactual(images, [1, 2], 0.5, 20.0, generator=seeded(), **settings).images
    assert torch.equal(got, again)
    plain = pipe.counterfactual(images, "dog", 0.5, 0.0, generator=seeded(), **settings).images
    assert (got - plain).abs().max() > 1e-4
    # by the scheduler's own functions
    other = scheduler()
    other.set_timesteps(10)
    times = other.timesteps[5:]
    if hasattr(other, "set_begin_index"):
        other.set_begin_index(5)
    noise = torch.randn(2, 1, 16, 16, generator=seeded())
    flow = scheduler is FlowMatchEulerDiscreteScheduler
    sigma = times[0] / 1000
    x = 2 * images - 1
    x = (1 - sigma) * x + sigma * noise if flow else other.add_noise(x, noise, times[:1].expand(2))
    with torch.no_grad():
        for t in times:
            x = other.step(pipe.unet(x if flow else other.scale_model_input(x, t), t).sample, t, x).prev_sample
    torch.testing.assert_close(plain, (x / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), FlowMatchODEScheduler(solver="heun")])
def test_a_counterfactual_begins_with_a_step(scheduler):
    """Also of a sampler with two network calls a step, one in the last: of 4 steps 0.6 takes 2, with 3 calls."""
    pipe, seen = make(scheduler=scheduler), []

    def keep(pipe, step, timestep, tensors):
        seen.append(float(timestep))

    settings = {"num_inference_steps": 4, "output_type": "pt", "callback_on_step_end": keep}
    pipe.counterfactual(torch.rand(1, 1, 16, 16), 1, 0.6, 0.0, **settings)
    scheduler.set_timesteps(4)
    assert seen == scheduler.timesteps[4:].tolist()
    assert seen[0] > seen[1] == seen[2]


def test_one_class_in_the_file():
    assert check_pipeline_file(ROOT / "pipelines" / "joint_diffusion" / "pipeline.py") == "JointDiffusionPipeline"


def test_the_classifier_is_never_offloaded():
    """It runs amid the network's forward: an offload hook of its own would send the network away."""
    pipe = make()
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.unet, "_hf_hook")
    assert not hasattr(pipe.classifier, "_hf_hook")


@pytest.mark.parametrize("kind", ["unet", "vit"])
def test_half_precision(kind):
    full = sample(make(kind), class_labels=[1, 2], guidance_scale=2.0)
    pipe = make(kind).to(torch.bfloat16)
    low = sample(pipe, class_labels=[1, 2], guidance_scale=2.0, latents=torch.randn(full.shape, generator=seeded()))
    assert low.dtype == torch.float32
    assert (low - full).abs().mean() < 0.05
    assert pipe.classify(full).logits.dtype == torch.float32


class Shift(PipelineCallback):
    tensor_inputs = ["latents", "class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] + (step_index == 3)}


def test_callbacks():
    pipe, seen = make(), []
    settings = {"class_labels": [1, 2], "guidance_scale": 5.0, "output_type": "latent"}
    want = sample(pipe, **settings)

    def keep(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].clone(), tensors["class_labels"].tolist()))

    names = ["latents", "class_labels"]
    got = sample(pipe, **settings, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(got, want)
    assert [(step, t, labels) for step, t, _, labels in seen] == [
        (i, t, [1, 2]) for i, t in enumerate((750, 500, 250, 0))
    ]
    torch.testing.assert_close(sample(pipe, **settings, callback_on_step_end=Shift()), want + 1)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    assert torch.equal(sample(pipe, **settings, callback_on_step_end=stop), seen[1][2])
    assert pipe.guidance_scale == 5.0
    with pytest.raises(ValueError, match="asked for \\['noise'\\]"):
        sample(pipe, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["noise"])


def test_outputs():
    pipe, noise = make(), torch.randn(2, 1, 16, 24, generator=seeded())
    raw = sample(pipe, latents=noise, output_type="latent")
    pixels = sample(pipe, latents=noise)
    assert torch.equal((raw / 2 + 0.5).clamp(0, 1), pixels)
    assert np.array_equal(sample(pipe, latents=noise, output_type="np"), pixels.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in sample(pipe, latents=noise, output_type="pil")] == [(24, 16)] * 2
    (images,) = pipe(latents=noise, num_inference_steps=4, output_type="pt", return_dict=False)
    assert torch.equal(images, pixels)
    torch.manual_seed(3)
    first = sample(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(sample(pipe, generator=None), first)
