"""Self-attention guidance against diffusers' pipeline and against loops that hold the whole map."""

import math
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionSAGPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from diffusers_repr import SAG, Denoiser, guide
from tests.guidance.sag_cases import (
    SD_MID,
    blurred,
    guided_eps,
    latents_of,
    level_of,
    noise,
    pixel_model,
    randomised,
    sd_model,
)
from tests.testers.models import build


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Against diffusers

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_the_pipeline_of_diffusers(scheduler, guidance_scale):
    pipe = sd_model().to(torch.float64)  # the mask is a threshold, on whose other side rounding may land
    extra = {"skip_prk_steps": True} if scheduler == "pndm" else {}
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config, **extra)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    theirs = StableDiffusionSAGPipeline(**{name: getattr(pipe, name) for name in names}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    settings = {"steps": 4, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    plain = latents_of(pipe, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = latents_of(theirs, sag_scale=0.75, **settings)
    with guide(pipe, SAG(0.75)):
        got = latents_of(pipe, **settings)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Twin(UNet2DModel):
    """A network of noise that tells the same by another quantity."""

    tells = "epsilon"
    levels = ()

    def forward(self, sample, timestep, return_dict=True, **kwargs):
        eps = super().forward(sample, timestep, return_dict=False, **kwargs)[0]
        alpha, sigma = self.levels[int(torch.as_tensor(timestep).flatten()[0])]
        if self.tells == "v_prediction":
            out = (eps - sigma * sample) / alpha
        elif self.tells == "sample":
            out = (sample - sigma * eps) / alpha
        else:
            out = eps
        self.told.append(out)
        return (out,)


def twins(tells):
    model = pixel_model()
    twin = Twin(**{k: v for k, v in model.config.items() if not k.startswith("_")}).double().eval()
    twin.load_state_dict(model.state_dict())
    twin.told = []
    twin.tells, twin.levels = tells, [level_of(DDIMScheduler(), t) for t in range(1000)]
    return model, twin


@pytest.mark.parametrize("tells", ["v_prediction", "sample"])
def test_a_twin_with_another_prediction_has_the_same_guided_eps(tells):
    model, twin = twins(tells)
    x, timestep, scale = noise(2, 2, 16, 16), 500, 1.5
    alpha, sigma = twin.levels[timestep]

    def eps_of(output):
        return sigma * x + alpha * output if tells == "v_prediction" else (x - alpha * output) / sigma

    with guide(Denoiser(model, DDIMScheduler()), SAG(scale)):
        expected = model(x, timestep).sample
    with guide(Denoiser(twin, DDIMScheduler(prediction_type=tells)), SAG(scale)):
        got = twin(x, timestep)[0]
    assert (expected - model(x, timestep).sample).abs().max() > 1e-2
    torch.testing.assert_close(eps_of(got), expected, rtol=0, atol=1e-6)
    # The difference of outputs, which diffusers' pipeline takes, is not it.
    (first, second) = twin.told
    assert (eps_of(first + scale * (first - second)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
def test_twins_draw_the_same_samples(sampler):
    settings = {"beta_schedule": "linear", **({"clip_sample": False} if sampler is DDIMScheduler else {})}
    drawn = []
    for model, tells in zip(twins("v_prediction"), ("epsilon", "v_prediction"), strict=True):
        scheduler = sampler(prediction_type=tells, timestep_spacing="leading", **settings)
        scheduler.set_timesteps(4)
        x = noise(1, 2, 16, 24) * scheduler.init_noise_sigma
        with guide(Denoiser(model, scheduler), SAG(1.0), scheduler=scheduler):
            for t in scheduler.timesteps:
                x = scheduler.step(model(scheduler.scale_model_input(x, t), t)[0], t, x).prev_sample
        drawn.append(x)
    # A sampler of float32; Euler starts at a standard deviation of 157.
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-6 * max(10.0, float(drawn[0].abs().max())))


# Against loops in float64


def check_against_loops(model, module, x, level, grid, call, *, scale=1.3, denoiser=None, **settings):
    """`call(x)` -> the network's output, guided if guidance is on; a network of noise."""
    expected = guided_eps(call, module, x, level, grid, scale, **settings)
    config = {"blur_sigma": settings.pop("sigma", None), **settings}
    path = next(path for path, found in model.named_modules() if found is module)
    with guide(denoiser, SAG(scale, layers=path, **config)) as handle:
        got = call(x)
    assert (got - call(x)).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert (handle.stats.lanes, handle.stats.passes) == (2, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sigma": 2.5, "kernel_size": 5},
        {"threshold": 1.02},
        {"clip": 0.5},
        {"sigma": 3.0, "kernel_size": 31},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_pixel_network_equals_the_loops(settings):
    model, scheduler = pixel_model(), DDIMScheduler()
    x, at = noise(2, 2, 16, 24), 400

    def call(x):
        return model(x, at).sample

    module = model.mid_block.attentions[0]
    check_against_loops(
        model, module, x, level_of(scheduler, at), (4, 6), call, denoiser=Denoiser(model, scheduler), **settings
    )


@pytest.mark.parametrize("path", ["down_blocks.1.attentions.0", "up_blocks.1.attentions.1"])
def test_any_layer_may_be_read(path):
    model, scheduler = pixel_model(), DDIMScheduler()
    module = model.get_submodule(path)
    check_against_loops(
        model,
        module,
        noise(1, 2, 8, 16),
        level_of(scheduler, 400),
        (4, 8),
        lambda x: model(x, 400).sample,
        denoiser=Denoiser(model, scheduler),
    )


def test_classes_stay_those_of_the_call():
    model, scheduler = pixel_model(3, num_class_embeds=10), DDIMScheduler()
    labels = torch.tensor([3, 7])
    check_against_loops(
        model,
        model.mid_block.attentions[0],
        noise(2, 3, 16, 24),
        level_of(scheduler, 700),
        (4, 6),
        lambda x: model(x, 700, class_labels=labels).sample,
        denoiser=Denoiser(model, scheduler),
    )


# (H, W) of the latents, and of the tokens: three halvings, rounded up.
GRIDS = [((16, 24), (2, 3)), ((65, 65), (9, 9)), ((13, 34), (2, 5)), ((9, 10), (2, 2))]


@pytest.mark.parametrize(("size", "grid"), GRIDS)
def test_latents_of_any_size_equal_the_loops(size, grid):
    pipe = sd_model()
    model = pipe.unet.double()
    text = noise(1, 7, model.config.cross_attention_dim, seed=2)
    check_against_loops(
        model,
        model.get_submodule(SD_MID),
        noise(1, 4, *size),
        level_of(pipe.scheduler, 600),
        grid,
        lambda x: model(x, 600, encoder_hidden_states=text).sample,
        denoiser=Denoiser(model, pipe.scheduler),
    )


def test_sdxl_equals_the_loops():
    pipe = sd_model("sdxl")
    model = pipe.unet.double()
    text = noise(2, 7, model.config.cross_attention_dim, seed=2)
    added = {"text_embeds": noise(2, 16, seed=3), "time_ids": torch.ones(2, 6, dtype=torch.float64)}
    check_against_loops(
        model,
        model.get_submodule(SD_MID),
        noise(2, 4, 8, 12),
        level_of(pipe.scheduler, 600),
        (4, 6),
        lambda x: model(x, 600, encoder_hidden_states=text, added_cond_kwargs=added).sample,
        denoiser=Denoiser(model, pipe.scheduler),
    )


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_transformers_equal_the_loops(name):
    pipe = build(name)
    model = randomised(pipe.transformer)
    size = (16, 16) if name == "dit" else (16, 24)
    if name == "dit":
        extra = {"class_labels": torch.tensor([3, 1000])}
    else:
        text = noise(2, 5, model.config.caption_channels, seed=2)
        extra = {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    at = torch.tensor([600, 600])
    check_against_loops(
        model,
        model.get_submodule("transformer_blocks.1.attn1"),
        noise(2, 4, *size),
        level_of(pipe.scheduler, 600),
        (size[0] // 2, size[1] // 2),
        lambda x: model(x, timestep=at, **extra).sample[:, :4],
        denoiser=Denoiser(model, pipe.scheduler),
    )


def flow(output, x, alpha, sigma):
    """velocity = eps - x_0."""
    return x - sigma * output, x + alpha * output


def edm(output, x, alpha, sigma):
    """Karras et al. 2022, table 1: x = c_in (x_0 + s eps)."""
    data, s, noisy = 0.5, sigma / alpha, x / alpha
    x0 = data**2 / (s**2 + data**2) * noisy + s * data / math.sqrt(s**2 + data**2) * output
    return x0, (noisy - x0) / s


def sample(output, x, alpha, sigma):
    return output, (x - alpha * output) / sigma


def velocity(output, x, alpha, sigma):
    return alpha * x - sigma * output, sigma * x + alpha * output


FORMS = {
    "sample": (lambda: DDIMScheduler(prediction_type="sample"), 500, sample),
    "v": (lambda: DDIMScheduler(prediction_type="v_prediction"), 500, velocity),
    "flow": (FlowMatchEulerDiscreteScheduler, 600, flow),
    "edm": (EDMEulerScheduler, 0.25 * math.log(1.7), edm),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_prediction_equals_the_loops_in_eps(form):
    make, at, read = FORMS[form]
    model, scheduler = pixel_model(), make()
    if form == "flow":
        level = (0.4, 0.6)
    elif form == "edm":
        norm = math.sqrt(1.7**2 + 0.25)
        level = (1 / norm, 1.7 / norm)
    else:
        level = level_of(scheduler, at)
    x = noise(2, 2, 16, 24)
    at = torch.tensor(at, dtype=torch.float64)

    def to_x0_eps(output, x):
        return read(output, x, *level)

    def call(x):
        return model(x, at).sample

    expected = guided_eps(call, model.mid_block.attentions[0], x, level, (4, 6), 1.3, to_x0_eps)
    with guide(Denoiser(model, scheduler), SAG(1.3)):
        got = to_x0_eps(call(x), x)[1]
    assert (got - to_x0_eps(call(x), x)[1]).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise(kind):
    """At alpha = 0 the degraded input is the input: what is left is the shift of x_0 itself, in the output."""
    model = pixel_model()
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    x = noise(1, 2, 16, 24)
    plain = model(x, 999).sample
    x0 = plain if kind == "sample" else -plain
    with guide(Denoiser(model, scheduler), SAG(0.7, threshold=-1.0)):
        got = model(x, 999).sample
    shift = 0.7 * (blurred(x0, 1.0, 9) - x0)
    torch.testing.assert_close(got, plain + (shift if kind == "sample" else -shift), rtol=0, atol=1e-9)


def test_euler_equals_a_trajectory_by_hand():
    """State x_0 + s eps; the network takes it over sqrt(1 + s^2), which is where the guidance acts."""
    model = pixel_model()
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(5)
    start = noise(1, 2, 16, 24) * float(scheduler.init_noise_sigma)
    x = start
    with guide(Denoiser(model, scheduler), SAG(0.8), scheduler=scheduler):
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t)[0], t, x).prev_sample
    by_hand, sigmas = start, scheduler.sigmas.double()
    for t, here, after in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        alpha = float((1 + here**2).rsqrt())
        level = (alpha, float(here) * alpha)
        eps = guided_eps(
            lambda x, t=t: model(x, t).sample, model.mid_block.attentions[0], alpha * by_hand, level, (4, 6), 0.8
        )
        by_hand = by_hand + (after - here) * eps
    torch.testing.assert_close(x, by_hand, rtol=0, atol=1e-4 * float(start.abs().max()))
