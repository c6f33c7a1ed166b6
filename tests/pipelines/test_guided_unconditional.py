"""`GuidedUnconditionalPipeline`: equal to the stock pipelines; every sampler, classes and their guidance."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

from diffusers_repr import CFG, PAG, guide
from tests.testers.models import build, saved, unet2d


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, scheduler=None):
    pipe = build(name)
    ours = GuidedUnconditionalPipeline(pipe.unet, scheduler or pipe.scheduler)
    ours.set_progress_bar_config(disable=True)
    return ours


def sample(pipe, **settings):
    settings = {"num_inference_steps": 4, "output_type": "np", "generator": seeded(), **settings}
    return pipe(**settings).images


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("stock", [DDPMPipeline, DDIMPipeline])
def test_equal_to_the_stock_pipelines(name, stock):
    pipe = build(name)
    pipe = stock(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    ours = make(name, pipe.scheduler)
    assert np.array_equal(sample(ours, batch_size=3), sample(pipe, batch_size=3))
    for generator in (lambda: [seeded(1), seeded(2)], lambda: seeded(3)):
        settings = {"batch_size": 2, "output_type": "pt"}
        want = sample(pipe, **settings, generator=generator())
        if isinstance(want, np.ndarray):  # up to diffusers 0.36
            want = torch.from_numpy(want).permute(0, 3, 1, 2)
        assert torch.equal(sample(ours, **settings, generator=generator()), want)
    if isinstance(pipe, DDIMPipeline):
        for extra in (
            {"eta": 0.7},
            {"use_clipped_model_output": True},
            {"eta": 1.0, "use_clipped_model_output": True},
        ):
            assert np.array_equal(sample(ours, **extra), sample(pipe, **extra))
    (want,), (got,) = sample(pipe, output_type="pil"), sample(ours, output_type="pil")
    assert got.mode == want.mode
    assert got.tobytes() == want.tobytes()
    torch.manual_seed(5)
    want = sample(pipe, generator=None)
    torch.manual_seed(5)
    assert np.array_equal(sample(ours, generator=None), want)


def test_the_number_of_steps_is_the_stock_pipelines():
    calls = []
    for scheduler, steps in ((DDPMScheduler(), 1000), (DDIMScheduler(), 50), (EulerDiscreteScheduler(), 50)):
        ours = make("ddpm", scheduler)
        ours.unet.forward = lambda x, *a, **k: (calls.append(1), (torch.zeros_like(x),))[1]
        calls.clear()
        ours(output_type="latent")
        assert len(calls) == steps


@pytest.mark.slow
def test_every_sampler_solves_the_same_equation():
    """The probability flow has one solution: DDIM in many small steps, and others in few, meet."""
    ours = make("ddpm", DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    betas = {"beta_start": 1e-4, "beta_end": 0.02}  # from_config takes a class's own default for another's default
    noise = torch.randn(2, 1, 16, 16, generator=seeded())
    settings = {"latents": noise, "output_type": "latent"}
    want, config = sample(ours, **settings, num_inference_steps=250), ours.scheduler.config
    assert (want - noise).norm() / want.norm() > 0.2
    for scheduler, steps in (
        (EulerDiscreteScheduler, 50),
        (HeunDiscreteScheduler, 30),
        (DPMSolverMultistepScheduler, 30),
        (UniPCMultistepScheduler, 30),
    ):
        ours.scheduler = scheduler.from_config(config, **betas)
        got = sample(ours, **settings, num_inference_steps=steps)
        assert (got - want).norm() / want.norm() < 0.02, scheduler


@pytest.mark.parametrize(
    "scheduler", [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()], ids=lambda s: type(s).__name__
)
def test_other_processes(scheduler):
    """By a loop over each process's own Euler step, written out."""
    ours = make("ddpm", scheduler)
    noise = torch.randn(2, 1, 16, 16, generator=seeded())
    got = sample(ours, latents=noise, output_type="latent")
    scheduler.set_timesteps(4)
    sigmas, x = scheduler.sigmas.double(), noise.double()
    unet = ours.unet.double()
    with torch.no_grad():
        if isinstance(scheduler, EDMEulerScheduler):
            data = scheduler.config.sigma_data
            x = x * (sigmas[0] ** 2 + 1) ** 0.5  # as EDMEulerScheduler starts
            for at, after in zip(sigmas[:-1], sigmas[1:], strict=True):
                total = at**2 + data**2
                out = unet(x / total**0.5, 0.25 * at.log(), return_dict=False)[0]
                x0 = data**2 / total * x + at * data / total**0.5 * out
                x = x + (after - at) * (x - x0) / at
        else:
            for t, at, after in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
                x = x + (after - at) * unet(x, t, return_dict=False)[0]
    assert (got.double() - x).norm() / x.norm() < 1e-4


def loop(unet, scheduler, labels, scale, steps=4, shape=(3, 16, 16)):
    """Classifier-free guidance written out, with a call of the network for each half."""
    x = torch.randn(len(labels), *shape, generator=seeded(), dtype=torch.float64)
    labels, null = torch.tensor(labels), torch.full((len(labels),), 9)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = unet(x, t, class_labels=labels).sample
            uncond = unet(x, t, class_labels=null).sample
            x = scheduler.step(scale * cond + (1 - scale) * uncond, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classes(scale):
    ours = make("class_unet")
    ours.unet.double()
    want = loop(ours.unet, DDIMScheduler(), [2, 5, 9], scale)
    settings = {"guidance_scale": scale, "output_type": "pt"}
    got = sample(ours, class_labels=[2, 5, 9], **settings)
    assert (got - want).abs().max() < 1e-5
    assert ours.do_classifier_free_guidance is (scale > 1)
    assert ours.guidance_scale == scale
    for same in ((2, 5, 9), torch.tensor([2, 5, 9]), np.array([2, 5, 9], dtype=np.int32)):
        assert torch.equal(sample(ours, class_labels=same, **settings), got)
    for one in (2, [2], torch.tensor(2), np.int64(2)):
        assert torch.equal(sample(ours, class_labels=one, **settings), sample(ours, class_labels=[2], **settings))
        first = sample(ours, class_labels=one, batch_size=3, **settings)
        assert torch.equal(first, sample(ours, class_labels=[2, 2, 2], **settings))
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_no_labels_are_the_null_class():
    ours = make("class_unet")
    assert ours.null_label == 9
    assert np.array_equal(sample(ours, batch_size=2), sample(ours, class_labels=9, batch_size=2))
    null, other = sample(ours, batch_size=2), sample(ours, class_labels=3, batch_size=2)
    assert np.abs(null - other).max() > 1e-4
    assert make("ddpm").null_label is None


def test_guidance_on_classes():
    ours = make("class_unet")
    settings = {"class_labels": [2, 5], "output_type": "pt"}
    stock = sample(ours, **settings, guidance_scale=4.0)
    instead = sample(ours, **settings, guidance_scale=1.5, guidance=CFG(4.0))
    assert (instead - stock).abs().max() < 1e-5
    assert [(step.lanes, step.passes) for step in ours.guidance_stats.steps] == [(2, 1)] * 4
    in_part = sample(ours, **settings, guidance_scale=1.5, guidance=CFG(4.0, interval=(400, 999)))
    assert [step.lanes for step in ours.guidance_stats.steps] == [2, 2, 1, 1]
    assert (in_part - stock).abs().max() > 1e-4
    with guide(ours, PAG(2.0)):
        want = sample(ours, **settings, guidance_scale=4.0)
    assert torch.equal(sample(ours, **settings, guidance_scale=4.0, guidance=PAG(2.0)), want)
    assert [step.lanes for step in ours.guidance_stats.steps] == [3] * 4
    with pytest.raises(ValueError, match="CFG needs the null condition"):
        sample(ours, **settings, guidance=CFG(4.0))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_guidance_without_classes_is_that_of_guide(name):
    pipe, ours = build(name), make(name)
    plain = sample(pipe, batch_size=2)
    with guide(pipe, PAG(2.0)):
        want = sample(pipe, batch_size=2)
    assert np.array_equal(sample(ours, batch_size=2, guidance=PAG(2.0)), want)
    assert np.abs(want - plain).max() > 1e-4
    assert np.array_equal(sample(ours, batch_size=2, guidance=[]), plain)
    assert ours.guidance_stats is None


def test_learned_variance():
    torch.manual_seed(0)
    unet = unet2d(3, out_channels=6, num_class_embeds=10).eval()
    learned = DDPMScheduler(variance_type="learned_range")
    plain = unet2d(3, out_channels=6).eval()
    stock, ours = DDPMPipeline(plain, learned), GuidedUnconditionalPipeline(plain, learned)
    assert np.array_equal(sample(ours, batch_size=2), sample(stock, batch_size=2))
    settings = {"class_labels": [2, 5], "output_type": "pt"}
    ours = GuidedUnconditionalPipeline(unet.double(), DDIMScheduler())
    for scale in (1.0, 3.0):

        def first(x, t, class_labels):
            return diffusers.models.unets.unet_2d.UNet2DOutput(unet(x, t, class_labels).sample[:, :3])

        want = loop(first, DDIMScheduler(), [2, 5], scale)
        assert (sample(ours, **settings, guidance_scale=scale) - want).abs().max() < 1e-5
    ours.scheduler = learned
    generator = seeded()
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    learned.set_timesteps(4)
    for t in learned.timesteps:
        with torch.no_grad():
            cond, null = (unet(x, t, class_labels=torch.tensor(ids)).sample for ids in ([2, 5], [9, 9]))
        mean = 3.0 * cond[:, :3] - 2.0 * null[:, :3]
        x = learned.step(torch.cat([mean, cond[:, 3:]], 1), t, x, generator=generator).prev_sample
    want = (x / 2 + 0.5).clamp(0, 1)
    assert (sample(ours, **settings, guidance_scale=3.0) - want).abs().max() < 1e-5


def test_it_tells_that_models_may_go(monkeypatch):
    ours, calls = make("ddpm"), []
    monkeypatch.setattr(type(ours), "maybe_free_model_hooks", lambda self: calls.append(self))
    sample(ours)
    assert calls == [ours]


@pytest.mark.parametrize("kind", ["identity", "timestep"])
def test_class_embeddings_without_a_table(kind):
    torch.manual_seed(0)
    unet = unet2d(3, class_embed_type=kind).eval()
    ours = GuidedUnconditionalPipeline(unet, DDIMScheduler())
    labels = torch.randn(2, 32) if kind == "identity" else torch.tensor([3.0, 250.5])
    got = sample(ours, class_labels=labels, output_type="pt")
    x = torch.randn(2, 3, 16, 16, generator=seeded())
    ours.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in ours.scheduler.timesteps:
            x = ours.scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    assert torch.equal(got, (x / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="does not tell a null class"):
        sample(ours)
    with pytest.raises(ValueError, match=f"needs a null class, .*class_embed_type='{kind}'"):
        sample(ours, class_labels=labels, guidance_scale=2.0)


def test_latents_and_outputs():
    ours = make("ddpm", EulerDiscreteScheduler())
    noise = torch.randn(2, 1, 16, 16, generator=seeded())
    assert np.array_equal(sample(ours, latents=noise), sample(ours, batch_size=2))
    other = torch.randn(2, 1, 16, 24, generator=seeded())
    raw = sample(ours, latents=other, output_type="latent")
    pixels = sample(ours, latents=other, output_type="pt")
    assert raw.shape == (2, 1, 16, 24)
    assert torch.equal((raw / 2 + 0.5).clamp(0, 1), pixels)
    assert np.array_equal(sample(ours, latents=other), pixels.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in sample(ours, latents=other, output_type="pil")] == [(24, 16)] * 2
    (images,) = ours(latents=other, num_inference_steps=4, output_type="pt", return_dict=False)
    assert torch.equal(images, pixels)


class Shift(PipelineCallback):
    tensor_inputs = ["latents", "class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] + step_index}


def test_callbacks():
    ours, seen = make("class_unet"), []

    def keep(pipe, step, timestep, tensors):
        seen.append((pipe, step, int(timestep), tensors))

    settings = {"class_labels": [2, 5], "guidance_scale": 3.0, "output_type": "latent"}
    want = sample(ours, **settings)
    names = ["latents", "class_labels"]
    got = sample(ours, **settings, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(got, want)
    assert [(step, timestep) for _, step, timestep, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert torch.equal(seen[-1][3]["latents"], want)
    assert seen[0][3]["class_labels"].tolist() == [2, 5]

    def add(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + (step == 3)}

    assert torch.equal(sample(ours, **settings, callback_on_step_end=add), want + 1)
    assert torch.equal(sample(ours, **settings, callback_on_step_end=Shift()) - 3, shifted(ours, settings))

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    assert torch.equal(sample(ours, **settings, callback_on_step_end=stop), seen[1][3]["latents"])
    assert torch.equal(sample(ours, **settings), want)


def shifted(ours, settings):
    """As `Shift` without its last step, by a plain function."""
    return sample(ours, **settings, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] + i * (i < 3)})


def test_a_callback_may_change_labels_and_switch_guidance_off():
    ours = make("class_unet")

    def change(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            return {"class_labels": torch.tensor([7, 7])}
        return None

    rows = []
    ours.unet.register_forward_pre_hook(lambda m, a, k: rows.append(k["class_labels"].tolist()), with_kwargs=True)
    sample(ours, class_labels=[2, 5], guidance_scale=3.0, callback_on_step_end=change)
    assert rows == [[9, 9, 2, 5]] * 2 + [[7, 7]] * 2
    rows.clear()
    sample(ours, class_labels=[2, 5], guidance_scale=3.0, callback_on_step_end=change, guidance=PAG(2.0))
    assert [step.lanes for step in ours.guidance_stats.steps] == [3, 3, 2, 2]


def test_saving_while_guided(tmp_path):
    ours = make("ddim")
    handle = guide(ours, PAG(2.0))
    ours.save_pretrained(tmp_path)
    handle.remove()
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is DDIMPipeline


def test_saving(tmp_path):
    for name, scheduler, want in (
        ("class_unet", None, "DDIMPipeline"),
        ("ddpm", None, "DDPMPipeline"),
        ("ddpm", EulerDiscreteScheduler(), "GuidedUnconditionalPipeline"),
    ):
        folder = tmp_path / f"{name}-{want}"
        ours = make(name, scheduler)
        ours.save_pretrained(folder)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == want
        again = GuidedUnconditionalPipeline.from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        assert type(again.scheduler) is type(ours.scheduler)
        assert np.array_equal(sample(again, batch_size=2), sample(ours, batch_size=2))
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "class_unet-DDIMPipeline")) is DDIMPipeline
    half = GuidedUnconditionalPipeline.from_pretrained(saved("class_unet"), dtype=torch.bfloat16)
    images = sample(half, class_labels=3, guidance_scale=2.0, output_type="pt", guidance=PAG(2.0))
    assert images.dtype == half.unet.dtype == torch.bfloat16
    assert sample(half).dtype == np.float32
    moved = GuidedUnconditionalPipeline.from_pipe(build("class_unet"))
    assert np.array_equal(sample(moved), sample(make("class_unet")))
