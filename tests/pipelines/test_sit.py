"""SiTPipeline against its samplers written out, and as a pipeline: conditions, dtypes, saving, bad input."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from diffusers_repr import CFG, PAG, guide
from diffusers_repr.hub import check_pipeline_file
from diffusers_repr.models.sit import SiTTransformer2DModel
from tests.pipelines.sit_cases import CLASSES, autoencoder, noise, ode_loop, pipeline, sde_loop
from tests.pipelines.test_custom_pipeline import ROOT
from tests.testers.guidance import Counter

LABELS = torch.tensor([3, 1])
INTERVALS = [{}, {"scale": 3.0}, {"scale": 3.0, "low": 0.25, "high": 0.75}, {"scale": 3.0, "high": 0.0401}]


def arguments(guidance):
    if not guidance:
        return {}
    interval = (guidance.get("low", 0.0), guidance.get("high", 1.0))
    return {"guidance_scale": guidance["scale"], "guidance_interval": interval}


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def sample(pipe, **given):
    """Latents, and so no rounding on the way."""
    return pipe(**{"num_inference_steps": 8, "output_type": "latent", **given}).images


@pytest.mark.parametrize("guidance", INTERVALS[:3])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ode_equals_the_loop(solver, guidance):
    pipe = pipeline(FlowMatchODEScheduler(solver=solver)).to(torch.float64)
    got = sample(pipe, class_labels=LABELS, latents=noise(), **arguments(guidance))
    want = ode_loop(pipe.transformer, noise(), LABELS, 8, solver == "heun", **guidance)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert float((got - noise()).abs().max()) > 0.1
    if guidance:
        assert float((got - sample(pipe, class_labels=LABELS, latents=noise())).abs().max()) > 1e-2


@pytest.mark.parametrize("guidance", INTERVALS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_sde_equals_the_loop(name, guidance):
    pipe = pipeline(FlowMatchSDEScheduler(path=name)).to(torch.float64)
    got = sample(pipe, class_labels=LABELS, latents=noise(), generator=seeds(7)[0], **arguments(guidance))
    want = sde_loop(pipe.transformer, noise(), LABELS, 8, seeds(7)[0], name, **guidance)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_outside_the_interval_the_network_is_called_with_the_conditional_rows_alone():
    inside = {"guidance_scale": 2.0, "guidance_interval": (0.25, 0.75), "class_labels": LABELS}
    for scheduler, rows in (
        (FlowMatchODEScheduler(), [2, 2, 4, 4, 4, 4, 4, 2]),  # t = 1, .875, .75, ..., .25, .125
        # Both calls of a step are as its start: the step from .25 ends at .125.
        (FlowMatchODEScheduler(solver="heun"), [2] * 4 + [4] * 10 + [2]),
        (FlowMatchSDEScheduler(), [2, 2, 4, 4, 4, 4, 2, 2]),
    ):
        pipe = pipeline(scheduler)
        with Counter(pipe.transformer) as counter:
            sample(pipe, **inside)
            assert counter.rows == rows
            sample(pipe, class_labels=LABELS)
        assert set(counter.rows[len(rows) :]) == {2}
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with Counter(pipe.transformer) as counter:
        sample(pipe, **inside, num_inference_steps=5)
    assert counter.rows == [2] * 4 + [4] * 4 + [2]  # steps from t = 1, .7503, .5005, .2508, .001


@pytest.mark.parametrize("interval", [(0.0, -1.0), (-1.0, -0.5)])
def test_an_interval_that_ends_below_zero_is_no_guidance(interval):
    pipe = pipeline(FlowMatchSDEScheduler())
    got = sample(pipe, class_labels=LABELS, guidance_scale=4.0, guidance_interval=interval, generator=seeds(0)[0])
    assert torch.equal(got, sample(pipe, class_labels=LABELS, generator=seeds(0)[0]))


def test_diffusers_euler():
    pipe = pipeline(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(6)
    times = pipe.scheduler.timesteps
    got = sample(pipe, class_labels=LABELS, latents=noise(), num_inference_steps=6)
    ours = pipeline(FlowMatchODEScheduler())
    x, network = noise(), ours.transformer.double()
    grid = [*(times.double() / 1000).tolist(), 0.0]
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            x = x + (after - t) * network(x, torch.tensor(1000 * t), LABELS).sample
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-5)


@torch.no_grad()
def test_ddim_of_a_converted_dit():
    """Noise and a variance come out; the first channels are guided, DDIM has no use for the variance."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    pipe = pipeline(scheduler, in_channels=4, out_channels=8, time_divisor=1.0)
    x, steps = noise(channels=4), 5
    settings = {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "guidance_channels": 3}
    got = sample(pipe, class_labels=LABELS, latents=x, num_inference_steps=steps, **settings)
    network, null = pipe.transformer.double(), torch.full_like(LABELS, CLASSES)
    for t in (800, 600, 400, 200, 0):
        eps = network(x, torch.tensor(t), LABELS).sample[:, :4]
        if t <= 500:
            free = network(x, torch.tensor(t), null).sample[:, :3]
            eps[:, :3] = free + 3 * (eps[:, :3] - free)
        a = scheduler.alphas_cumprod[t].double()
        after = scheduler.alphas_cumprod[t - 200].double() if t >= 200 else 1.0
        x = after**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - after) ** 0.5 * eps
    torch.testing.assert_close(got.double(), x, rtol=0, atol=2e-4)


@torch.no_grad()
def test_ddpm_reads_a_learned_variance():
    learned = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe = pipeline(learned, in_channels=4, out_channels=8, time_divisor=1.0)
    x = noise(channels=4, dtype=torch.float32)
    got = sample(pipe, class_labels=LABELS, latents=x, num_inference_steps=3, generator=seeds(0)[0])
    learned.set_timesteps(3)
    generator = seeds(0)[0]
    for t in learned.timesteps:
        x = learned.step(pipe.transformer(x, t, LABELS).sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(got, x)
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    fixed = sample(pipe, class_labels=LABELS, latents=noise(channels=4), num_inference_steps=3, generator=seeds(0)[0])
    assert float((fixed - got).abs().max()) > 1e-3


@pytest.mark.parametrize("scheduler", [FlowMatchODEScheduler(solver="heun"), FlowMatchSDEScheduler()])
def test_the_seed_decides_and_the_batch_does_not(scheduler):
    pipe = pipeline(scheduler)
    settings = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.8)}
    whole = sample(pipe, class_labels=[0, 1, 2], generator=seeds(5, 6, 7), **settings)
    assert torch.equal(whole, sample(pipe, class_labels=[0, 1, 2], generator=seeds(5, 6, 7), **settings))
    parts = [sample(pipe, class_labels=k, generator=seeds(5 + k), **settings) for k in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1
    other = sample(pipe, class_labels=[0, 1, 2], generator=seeds(5, 6, 8), **settings)
    torch.testing.assert_close(other[:2], whole[:2], rtol=0, atol=1e-6)
    assert float((other[2] - whole[2]).abs().max()) > 0.1


def test_classes_are_drawn_by_the_generator_after_the_noise():
    pipe, call = pipeline(), {"num_inference_steps": 2, "output_type": "pt"}
    first, again = (pipe(batch_size=6, generator=seeds(3)[0], **call) for _ in range(2))
    assert torch.equal(first.class_labels, again.class_labels)
    assert len(set(first.class_labels.tolist())) > 1
    assert all(0 <= label < CLASSES for label in first.class_labels.tolist())
    told = pipe(class_labels=first.class_labels, generator=seeds(3)[0], **call)
    assert torch.equal(told.images, first.images)
    whole = pipe(generator=seeds(3, 4, 5), **call)
    assert whole.class_labels.tolist() == [pipe(generator=[one], **call).class_labels.item() for one in seeds(3, 4, 5)]
    drawn = [pipe(num_inference_steps=1, batch_size=3).class_labels.tolist() for _ in range(6)]
    assert len({tuple(labels) for labels in drawn}) > 1


def test_null_class_and_names():
    pipe = pipeline(id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    steps = {"num_inference_steps": 1}
    assert pipe.null_label == CLASSES
    assert pipe(class_labels=CLASSES, batch_size=2, **steps).class_labels.tolist() == [CLASSES] * 2
    assert pipe("goldfish", **steps).class_labels.tolist() == [1]
    assert pipe(["Tinca tinca", "goldfish"], **steps).class_labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"\['cod'\]. Known names, see `pipe.labels`: Tinca tinca, goldfish, tench"):
        pipe("cod")
    with pytest.raises(ValueError, match="has no id2label"):
        pipeline()("cod")


@torch.no_grad()
def test_vectors():
    pipe = pipeline(num_classes=0, condition_dim=6)
    vectors, x = torch.randn(2, 6, generator=seeds(0)[0]), noise(dtype=torch.float32)
    with Counter(pipe.transformer) as counter:
        got = sample(pipe, condition=vectors, latents=x, num_inference_steps=1, guidance_scale=3.0)
    assert counter.rows == [4]
    cond, null = (pipe.transformer(x, 1000.0, condition=given).sample for given in (vectors, None))
    torch.testing.assert_close(got, x - (null + 3 * (cond - null)), rtol=0, atol=1e-5)
    assert float((cond - null).abs().max()) > 1e-2
    free = sample(pipe, latents=x, num_inference_steps=1)
    torch.testing.assert_close(free, x - null, rtol=0, atol=1e-6)
    one = sample(pipe, condition=vectors[0], latents=x, num_inference_steps=1)
    torch.testing.assert_close(one[:1], x[:1] - cond[:1], rtol=0, atol=1e-6)
    assert pipe(condition=vectors).class_labels is None


def test_a_model_without_classes():
    pipe = pipeline(num_classes=0)
    out = pipe(batch_size=2, generator=seeds(0)[0], output_type="np")
    assert out.images.shape == (2, 8, 8, 3)
    assert out.class_labels is None
    assert pipe.null_label is None
    with pytest.raises(ValueError, match=r"has no classes \(num_classes=0\)"):
        pipe(class_labels=0)
    with pytest.raises(ValueError, match=r"has neither \(num_classes=0, condition_dim=None\)"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="takes no vectors"):
        pipe(condition=torch.ones(6))


@torch.no_grad()
def test_latents_are_decoded_with_scale_and_shift():
    vae = autoencoder(scaling_factor=0.4, shift_factor=0.3)
    pipe = pipeline(FlowMatchSDEScheduler(), vae=vae)
    call = {"class_labels": LABELS, "num_inference_steps": 3}
    latents = sample(pipe, **call, generator=seeds(0)[0])
    assert latents.shape == (2, 4, 8, 8)
    images = pipe(**call, generator=seeds(0)[0], output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    want = (vae.decode(latents / 0.4 + 0.3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, want)
    (tall,) = pipe(**call, height=24, width=16, output_type="pil", return_dict=False)
    assert [image.size for image in tall] == [(16, 24)] * 2


@torch.no_grad()
def test_output_types_and_sizes_in_pixel_space():
    pipe = pipeline()
    call = {"class_labels": LABELS, "latents": noise(), "num_inference_steps": 2}
    x = sample(pipe, **call)
    tensor, array, images = (pipe(**call, output_type=kind).images for kind in ("pt", "np", "pil"))
    torch.testing.assert_close(tensor, (x.float() / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(images[1]) / 255 - array[1]).max() < 1 / 255
    assert sample(pipe, class_labels=0, height=12, width=4).shape == (1, 3, 12, 4)
    assert sample(pipe, class_labels=0, latents=noise(1)[:, :, :4]).shape == (1, 3, 4, 8)


def test_the_sample_stays_wide_whatever_the_network():
    exact = sample(pipeline(), class_labels=LABELS, latents=noise())
    pipe = pipeline().to(torch.bfloat16)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    got = sample(pipe, class_labels=LABELS, latents=noise().float())
    assert got.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert 0 < float((got - exact).abs().max()) < 0.1


@pytest.mark.parametrize("scheduler", [FlowMatchODEScheduler(solver="heun"), FlowMatchSDEScheduler(path="cosine")])
def test_guidance_from_outside(scheduler):
    """`guide` reads lanes and levels of this pipeline: its CFG is the pipeline's own."""
    pipe = pipeline(scheduler)
    call = {"class_labels": LABELS, "latents": noise().float()}
    want = sample(pipe, **call, guidance_scale=3.0, generator=seeds(0)[0])
    with guide(pipe, CFG(3.0)):
        got = sample(pipe, **call, guidance_scale=1.5, generator=seeds(0)[0])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    with guide(pipe, PAG(1.0, layers=["blocks.1.attn"])):
        perturbed = sample(pipe, **call, guidance_scale=3.0, generator=seeds(0)[0])
    assert float((perturbed - want).abs().max()) > 1e-3


def test_callbacks():
    pipe, seen = pipeline(FlowMatchODEScheduler()), []

    def watch(pipe, step, t, tensors):
        seen.append((step, float(t), sorted(tensors), pipe.do_classifier_free_guidance))
        if step == 1:
            pipe._guidance_scale = 1.0
            return {"latents": torch.zeros_like(tensors["latents"])}
        pipe._interrupt = step == 2
        return None

    x = sample(
        pipe,
        class_labels=LABELS,
        num_inference_steps=4,
        guidance_scale=2.0,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "class_labels"],
    )
    names = ["class_labels", "latents"]
    assert seen == [(0, 1000.0, names, True), (1, 750.0, names, True), (2, 500.0, names, False)]
    with torch.no_grad():
        want = -0.25 * pipe.transformer(torch.zeros(2, 3, 8, 8), torch.tensor(500.0), LABELS).sample
    torch.testing.assert_close(x, want)
    with pytest.raises(ValueError, match="asked for"):
        pipe(callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["noise"])


def test_a_network_in_training_mode_drops_no_label():
    pipe = pipeline(class_dropout_prob=1.0)
    want = sample(pipe, class_labels=LABELS, latents=noise())
    pipe.transformer.train()
    assert torch.equal(sample(pipe, class_labels=LABELS, latents=noise()), want)
    assert pipe.transformer.training


def test_saved_and_loaded(tmp_path):
    """Without remote code, and the network alone."""
    pipe = pipeline(FlowMatchSDEScheduler(path="cosine"), vae=autoencoder(), id2label={1: "goldfish"})
    pipe.save_pretrained(tmp_path / "model")
    want = pipe("goldfish", generator=seeds(0)[0], num_inference_steps=4, output_type="np").images
    again = SiTPipeline.from_pretrained(tmp_path / "model")
    assert again.scheduler.config.path == "cosine"
    assert np.array_equal(
        again("goldfish", generator=seeds(0)[0], num_inference_steps=4, output_type="np").images, want
    )
    alone = SiTTransformer2DModel.from_pretrained(tmp_path / "model", subfolder="transformer")
    assert torch.equal(alone.proj_out.weight, pipe.transformer.proj_out.weight)
    pixels = pipeline()
    pixels.save_pretrained(tmp_path / "pixels")
    assert json.loads((tmp_path / "pixels" / "model_index.json").read_text())["vae"] == [None, None]
    assert SiTPipeline.from_pretrained(tmp_path / "pixels").vae is None


def test_a_class_token_that_the_pipeline_does_not_hold_is_told_of(tmp_path):
    pipeline().save_pretrained(tmp_path)
    (tmp_path / "heads" / "class-token").mkdir(parents=True)
    with pytest.warns(UserWarning, match="earlier form of REG, whose class token no pipeline holds"):
        SiTPipeline.from_pretrained(tmp_path)


def test_the_file_can_be_published():
    assert check_pipeline_file(ROOT / "pipelines" / "sit" / "pipeline.py") == "SiTPipeline"
