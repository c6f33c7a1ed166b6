"""Every scheduler a pipeline takes: guided runs against loops written out; what is watched stays what it is."""

import copy
import importlib.util
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusers_repr import CFG, PAG, guide
from diffusers_repr.denoiser import Denoiser
from tests.testers.cases import pairs, some
from tests.testers.guidance import Counter, noise
from tests.testers.models import build

SAMPLERS = {entry.name: {} for entry in KarrasDiffusionSchedulers} | {
    "LCMScheduler": {},
    "TCDScheduler": {},
    "SASolverScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMParallelScheduler": {},
    "EulerDiscreteScheduler karras": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler karras": {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    "DDIMScheduler v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "EulerDiscreteScheduler zero": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
NEEDS = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}


def scheduler_of(name, config):
    cls, options = name.split()[0], SAMPLERS[name]
    if cls in NEEDS and importlib.util.find_spec(NEEDS[cls]) is None:
        pytest.skip(f"needs {NEEDS[cls]}")
    return getattr(diffusers, cls).from_config(config, **options)


class Identity:
    """Self-attention that gives each token its own value."""

    def __call__(self, attention, hidden_states, *args, **kwargs):
        return attention.to_out[0](attention.to_v(hidden_states))


@torch.no_grad()
def by_hand(pipe, latents, steps, cfg, pag, interval=(-1000, 1000), seed=0):
    """Stable Diffusion with both guidances, one network call a lane."""
    unet, scheduler, generator = pipe.unet, pipe.scheduler, torch.Generator().manual_seed(seed)
    cond, null = pipe.encode_prompt("a photo of a cat", "cpu", 1, True)
    scheduler.set_timesteps(steps)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    takes = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in (("generator", generator), ("eta", 0.0)) if key in takes}
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        c, n = (unet(given, t, encoder_hidden_states=embeds).sample for embeds in (cond, null))
        kept, attention.processor = attention.processor, Identity()
        perturbed = unet(given, t, encoder_hidden_states=cond).sample
        attention.processor = kept
        out = c + (cfg - 1) * (c - n)
        if interval[0] <= t <= interval[1]:
            out = out + pag * (c - perturbed)
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


def call(pipe, latents, steps, scale=2.0, **extra):
    """Latents of a run with the pipeline's own guidance on."""
    given = {"latents": latents, "generator": torch.Generator().manual_seed(0), "num_inference_steps": steps, **extra}
    height, width = 2 * latents.shape[2], 2 * latents.shape[3]
    return pipe(
        "a photo of a cat", guidance_scale=scale, height=height, width=width, output_type="latent", **given
    ).images


# Several orders, noise drawn in the step, sigmas and alphas, two calls a step.
FAST = ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]


@pytest.mark.parametrize("name", some(SAMPLERS, *FAST))
def test_stable_diffusion_under_every_scheduler(name):
    pipe = build("short_sd")
    pipe.scheduler = scheduler_of(name, pipe.scheduler.config)
    latents, steps = noise(1, 4, 16, 16), 4
    with guide(pipe, [PAG(2.0), CFG(4.0)]) as handle:
        found = call(pipe, latents, steps)
    assert type(pipe.scheduler) is getattr(diffusers, name.split()[0])
    if "SDE" not in name:  # torchsde draws from a tree of its own
        expected = by_hand(pipe, latents, steps, 4.0, 2.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert handle.stats.lanes == 3 * handle.stats.passes == 3 * len(pipe.scheduler.timesteps)
    assert [float(step.level.timestep) for step in handle.stats.steps] == pytest.approx(
        pipe.scheduler.timesteps.tolist()
    )


@pytest.mark.parametrize("name", some(["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"], "PNDMScheduler"))
def test_interval_under_schedulers_with_several_calls_a_step(name):
    pipe = build("short_sd")
    pipe.scheduler = scheduler_of(name, pipe.scheduler.config)
    latents = noise(1, 4, 16, 16)
    with guide(pipe, PAG(3.0, interval=(300, 600))) as handle:
        found = call(pipe, latents, 6, scale=2.0)
    expected = by_hand(pipe, latents, 6, 2.0, 3.0, interval=(300, 600))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert {len(step.acted) for step in handle.stats.steps} == {0, 1}


FLOWS = [
    ("sd3", FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)),
    ("sd3", FlowMatchHeunDiscreteScheduler(shift=3.0)),
    ("sd3", UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)),
    ("flux", DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
    ("flux", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
    ("flux", FlowMatchHeunDiscreteScheduler()),
]


@pytest.mark.parametrize(("name", "scheduler"), FLOWS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_flow_models_under_every_scheduler(name, scheduler):
    pipe = build(name)
    pipe.scheduler = scheduler
    takes = inspect.signature(scheduler.set_timesteps).parameters
    if name == "flux" and "sigmas" not in takes:
        pytest.skip("the pipeline hands it sigmas")
    size = {"height": 32, "width": 48}

    def run():
        torch.manual_seed(0)  # stochastic sampling of this scheduler draws from the global state
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=3, generator=generator, output_type="latent", **size).images

    own = {"guidance_scale": 1.0} if name == "sd3" else {}
    size |= own
    plain = run()
    with guide(pipe, PAG(2.0)) as handle:
        found = run()
    assert torch.isfinite(found).all()
    assert (found - plain).abs().max() > 1e-4
    assert handle.stats.lanes == 2 * len(scheduler.timesteps)
    again = run()
    assert torch.equal(again, plain)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    pairs(
        ["img2img", "inpaint"],
        [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler],
        ("img2img", HeunDiscreteScheduler),
        ("inpaint", EulerDiscreteScheduler),
    ),
)
def test_from_an_image_on(kind, scheduler):
    """A run that begins later: levels are those of its own steps; CFG equals the pipeline's."""
    stock = build("short_sd")
    parts = {**stock.components, "scheduler": scheduler.from_config(stock.scheduler.config)}
    parts.pop("image_encoder", None)
    cls = StableDiffusionImg2ImgPipeline if kind == "img2img" else StableDiffusionInpaintPipeline
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    extra = {"image": image, "strength": 0.6, "num_inference_steps": 5, "output_type": "latent"}
    if kind == "inpaint":
        extra |= {"mask_image": (image[:, :1] > 0.5).float(), "height": 32, "width": 32}

    def run(scale):
        return pipe("a cat", guidance_scale=scale, generator=torch.Generator().manual_seed(0), **extra).images

    expected = run(5.0)
    with guide(pipe, CFG(5.0, interval=(0, 999))) as handle:
        found = run(1.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    times = [float(step.level.timestep) for step in handle.stats.steps]
    assert 0 < len(times) < len(pipe.scheduler.timesteps)
    assert max(times) < 700
    with guide(pipe, PAG(3.0)):
        assert (run(1.5) - run(1.0)).abs().max() > 0


def test_a_run_that_ends_before_the_last_step_and_one_that_goes_on():
    """The two models of SDXL's ensemble."""
    base = build("sdxl")
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    shared = {"prompt": "a cat", "num_inference_steps": 10, "output_type": "latent"}

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        half = base(**shared, guidance_scale=scale, denoising_end=0.6, height=32, width=32, generator=generator)
        whole = refiner(
            **shared, guidance_scale=scale, denoising_start=0.6, image=half.images, strength=0.3, generator=generator
        )
        return half.images, whole.images

    expected = run(5.0)
    handle = guide(base, CFG(5.0))
    for found, wanted in zip(run(1.5), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert len(handle.stats.steps) == 4
    handle.remove()


# The scheduler stays what it is


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_signatures_and_identity(cls):
    pipe = build("short_sd")
    pipe.scheduler = scheduler = cls.from_config(pipe.scheduler.config)
    before = {name: inspect.signature(getattr(scheduler, name)) for name in ("step", "set_timesteps")}
    held, config = dict(vars(scheduler)), dict(scheduler.config)
    with guide(pipe, PAG(1.0)) as handle:
        assert pipe.scheduler is scheduler
        assert isinstance(scheduler, cls)
        assert type(scheduler).__name__ == cls.__name__
        for name, signature in before.items():
            assert inspect.signature(getattr(scheduler, name)) == signature
        assert vars(scheduler).keys() == held.keys()
        assert scheduler.step.__doc__ == cls.step.__doc__
        assert dict(scheduler.config) == config
        handle._engine.stats.calls = 1  # nothing is sampled here
    assert type(scheduler) is cls
    assert scheduler.step.__func__ is cls.step


def test_arguments_of_steps_and_custom_timesteps_arrive():
    pipe = build("short_sd")
    latents = noise(1, 4, 16, 16)
    for extra in ({"eta": 1.0}, {"timesteps": [800, 500, 20]}):
        if "timesteps" in extra:
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        expected = call(pipe, latents, 3, scale=4.0, **extra)
        with guide(pipe, CFG(4.0)):
            found = call(pipe, latents, 3, scale=1.5, **extra)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with guide(pipe, PAG(1.0)) as handle:
        call(pipe, latents, 3, sigmas=[10.0, 3.0, 1.0, 0.0])
    assert [float(step.level.nsr) for step in handle.stats.steps] == pytest.approx([10.0, 3.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_guided_scheduler_is_a_plain_one(how):
    pipe = build("short_sd")
    pipe.scheduler.set_timesteps(4)
    state, held = noise(1, 4, 8, 8), []
    with guide(pipe, PAG(1.0)) as handle:
        handle._engine.step_arguments = lambda arguments: held.append(1) or arguments
        twin = how(pipe.scheduler)
        assert type(twin) is DDIMScheduler
        other = type(pipe.scheduler).from_config(pipe.scheduler.config)  # as users make one from another
        other.set_timesteps(7)
        other.step(state, other.timesteps[0], state)
        twin.set_timesteps(7)
        assert len(pipe.scheduler.timesteps) == 4
        twin.step(state, twin.timesteps[0], state)
        assert not held
        pipe.scheduler.step(state, 750, state)
        assert held == [1]
        handle._engine.stats.calls = 1
    twin.step(state, twin.timesteps[0], state)


def test_attributes_saved_and_restored_by_a_pipeline():
    """As StableDiffusionPanoramaPipeline does between its views."""
    pipe = build("short_sd")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(4)
    state = noise(1, 4, 8, 8)
    with guide(pipe, PAG(1.0)) as handle:
        kept = copy.deepcopy(pipe.scheduler.__dict__)
        for _ in range(2):
            pipe.scheduler.__dict__.update(copy.deepcopy(kept))
            pipe.scheduler.step(state, pipe.scheduler.timesteps[0], state)
            assert pipe.scheduler.step_index == 1
        handle._engine.stats.calls = 1


def test_a_step_that_a_user_put_on_the_object_is_called():
    pipe = build("short_sd")
    steps, plain = [], pipe.scheduler.step

    def step(model_output, timestep, sample, **kwargs):
        steps.append(float(timestep))
        return plain(model_output, timestep, sample, **kwargs)

    pipe.scheduler.step = step
    latents = noise(1, 4, 16, 16)
    expected = call(pipe, latents, 2, scale=3.0)
    with guide(pipe, CFG(3.0)):
        torch.testing.assert_close(call(pipe, latents, 2, scale=1.5), expected, rtol=1e-5, atol=1e-5)
    assert len(steps) == 4
    assert vars(pipe.scheduler)["step"] is step


def test_one_scheduler_of_two_guided_networks():
    one, two = build("short_sd"), build("short_sd")
    two.scheduler = one.scheduler
    first, second = guide(one, CFG(3.0)), guide(two, CFG(5.0))
    latents = noise(1, 4, 16, 16)
    assert torch.equal(call(one, latents, 2), call(two, latents, 2)) is False
    first.remove()
    found = call(two, latents, 2)
    second.remove()
    assert type(one.scheduler) is DDIMScheduler
    assert vars(one.scheduler).keys() == vars(build("short_sd").scheduler).keys()
    torch.testing.assert_close(found, call(two, latents, 2, scale=5.0), rtol=1e-5, atol=1e-5)


def test_a_scheduler_replaced_while_guided():
    pipe = build("short_sd")
    latents, first = noise(1, 4, 16, 16), pipe.scheduler
    others = [EulerDiscreteScheduler.from_config(first.config), DPMSolverMultistepScheduler.from_config(first.config)]
    with guide(pipe, [CFG(3.0), PAG(1.0)]) as handle:
        for scheduler in (first, *others, first):
            pipe.scheduler = scheduler
            found = call(pipe, latents, 3)
            assert handle.stats.lanes == 9
            torch.testing.assert_close(found, by_hand_plain(pipe, latents), rtol=1e-4, atol=1e-3)
    assert [type(s).__mro__[0] for s in (first, *others)] == [
        DDIMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
    ]


def by_hand_plain(pipe, latents):
    """The loop on copies: the network and the scheduler of `pipe` are guided."""
    twin = build("short_sd")
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return by_hand(twin, latents, 3, 3.0, 1.0)


def test_another_pipeline_with_the_same_network():
    """The pipeline that runs tells its own lanes and scheduler."""
    pipe = build("short_sd")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        return other(
            "a cat",
            image=image,
            guidance_scale=scale,
            num_inference_steps=4,
            generator=generator,
            output_type="latent",
        ).images

    expected = run(4.0)
    latents = noise(1, 4, 16, 16)
    with guide(pipe, CFG(4.0)) as handle:
        call(pipe, latents, 2, scale=1.5)
        for _ in range(2):
            torch.testing.assert_close(run(1.5), expected, rtol=1e-5, atol=1e-5)
            assert len(handle.stats.steps) == 3
    with (
        pytest.raises(ValueError, match=r"given a Denoiser, but a StableDiffusionPipeline calls its network"),
        guide(Denoiser.from_pipe(pipe), PAG(1.0)),
    ):
        call(pipe, latents, 2)


def test_the_guidance_scale_may_end_during_a_run():
    """A callback may switch the pipeline's own guidance off, as its documentation shows."""
    pipe = build("short_sd")
    latents = noise(1, 4, 16, 16)

    def stop(pipeline, step, timestep, tensors):
        if step == 1:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    extra = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with Counter(pipe.unet.conv_in) as counter, guide(pipe, PAG(1e-9)):
        found = call(pipe, latents, 4, scale=3.0, **extra)
    assert counter.rows == [2, 2, 1, 1]
    torch.testing.assert_close(found, call(pipe, latents, 4, scale=3.0, **extra), rtol=1e-5, atol=1e-5)
