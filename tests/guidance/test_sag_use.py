"""Self-attention guidance in use: limits, cost, other guidances beside it, whole pipelines, bad input."""

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional

from diffusers_repr import CFG, PAG, SAG, Denoiser, guide
from diffusers_repr.denoiser.attention_layouts import SELF
from diffusers_repr.guidance import sag
from diffusers_repr.guidance.attention.received import attention_received
from diffusers_repr.guidance.sag import gaussian_blur
from tests.guidance.sag_cases import (
    SD_MID,
    blurred,
    full_map,
    guided_eps,
    latents_of,
    level_of,
    noise,
    pixel_model,
    sd_model,
)
from tests.testers.models import build


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def once(config, model=None, at=500, size=(16, 24)):
    """One call of a pixel network under guidance."""
    model = model or pixel_model()
    with guide(Denoiser(model, DDIMScheduler()), config):
        return model(noise(2, 2, *size), at).sample


# Limits


def test_affine_in_the_scale():
    zero = pixel_model()(noise(2, 2, 16, 24), 500).sample
    one, two, less = (once(SAG(scale)) for scale in (1.0, 2.0, -0.5))
    torch.testing.assert_close(two - one, one - zero, rtol=0, atol=1e-9)
    torch.testing.assert_close(less - zero, -0.5 * (one - zero), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        SAG(2.0, blur_sigma=1e-3),
        SAG(2.0, kernel_size=1),
        SAG(2.0, threshold=1e6),
        SAG(2.0, threshold=-1.0, blur_sigma=1e-3),
    ],
    ids=["no blur", "kernel of one pixel", "no mask", "full mask, no blur"],
)
def test_nothing_degraded_is_the_baseline_and_warns(config):
    with pytest.warns(UserWarning, match="SAG changed nothing in a whole run"):
        guided = once(config)
    torch.testing.assert_close(guided, pixel_model()(noise(2, 2, 16, 24), 500).sample, rtol=0, atol=1e-12)


def test_pixels_outside_of_the_mask_stay_bit_equal():
    model, x = pixel_model(), noise(2, 2, 16, 24)
    seen = []
    hook = model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with guide(Denoiser(model, DDIMScheduler()), SAG(1.0)):
        model(x, 500)
    hook.remove()
    assert torch.equal(seen[0], x)
    same = seen[1] == x
    assert 0.1 < float(same.double().mean()) < 0.9
    tokens = functional.avg_pool2d(same.double(), 4)  # 4 x 6 tokens: whole ones only
    assert bool(((tokens == 0) | (tokens == 1)).all())


# The attention, the mask and the blur


def test_attention_received_by_chunks_is_that_of_the_full_map():
    model = pixel_model()
    module, hidden = model.mid_block.attentions[0], noise(2, 16, 4, 6)
    expected = full_map(module, hidden).mean(1).sum(1)
    for chunk in (1, 5, 24, None):
        received = attention_received(module, SELF, {"hidden_states": hidden}, chunk)
        torch.testing.assert_close(received, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(received.mean(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("guidance_scale", "name"), [(1.0, "sd"), (4.0, "sd"), (4.0, "dit"), (4.0, "pixart")])
def test_attention_is_read_once_a_step_for_the_base_rows_alone(monkeypatch, guidance_scale, name):
    seen = []

    def spy(module, layout, arguments, chunk=None):
        received = attention_received(module, layout, arguments, chunk)
        seen.append(received)
        return received

    monkeypatch.setattr(sag, "attention_received", spy)
    pipe = build(name)
    size = {} if name == "dit" else {"height": 32, "width": 48}
    condition = {"class_labels": [3, 4]} if name == "dit" else {"prompt": ["a cat", "a dog"]}
    more = {"use_resolution_binning": False} if name == "pixart" else {}
    generator = torch.Generator().manual_seed(0)
    with guide(pipe, SAG()) as handle:
        pipe(**condition, **size, **more, generator=generator, num_inference_steps=3, guidance_scale=guidance_scale)
    assert len(seen) == len(handle.stats.steps)
    assert {len(received) for received in seen} == {2}
    for received in seen:
        torch.testing.assert_close(received.mean(1), torch.ones(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sigma", "kernel_size"), [(1.0, 9), (9.0, 31), (0.4, 3), (2.0, 1)])
def test_blur_equals_a_padded_convolution(sigma, kernel_size):
    image = noise(2, 3, 16, 21)
    torch.testing.assert_close(gaussian_blur(image, sigma, kernel_size), blurred(image, sigma, kernel_size))


def test_blur_leaves_a_constant_image():
    image = torch.full((1, 2, 17, 20), 3.7)
    torch.testing.assert_close(gaussian_blur(image, 9.0, 31), image, rtol=1e-6, atol=0)


def test_blur_keeps_its_precision_under_autocast():
    image = noise(1, 2, 16, 24, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gaussian_blur(image, 1.0, 9)
    assert torch.equal(inside, gaussian_blur(image, 1.0, 9))


def test_a_blur_made_in_inference_mode_serves_a_gradient():
    with torch.inference_mode():
        gaussian_blur(torch.ones(1, 1, 11, 13), 1.3, 5)
    with torch.enable_grad():
        image = torch.ones(1, 1, 11, 13, requires_grad=True)
        gaussian_blur(image, 1.3, 5).sum().backward()
    assert float(image.grad.sum()) == pytest.approx(11 * 13, rel=1e-5)


# Cost, and guidances beside it


@pytest.mark.parametrize(("guidance_scale", "lanes"), [(1.0, 2), (4.0, 3)])
def test_cost(guidance_scale, lanes):
    pipe = sd_model()
    with guide(pipe, SAG()) as handle:
        latents_of(pipe, guidance_scale=guidance_scale)
    assert [(step.lanes, step.passes, step.backward_passes) for step in handle.stats.steps] == [(lanes, 2, 0)] * 3


def test_adds_to_perturbed_attention():
    plain = pixel_model()(noise(2, 2, 16, 24), 500).sample
    both = once([SAG(0.7), PAG(2.0)])
    torch.testing.assert_close(both - plain, once(SAG(0.7)) + once(PAG(2.0)) - 2 * plain, rtol=0, atol=1e-9)


def test_cost_beside_perturbed_attention():
    pipe = sd_model()
    with guide(pipe, [SAG(), PAG()]) as handle:
        latents_of(pipe, guidance_scale=4.0)
    assert [(step.lanes, step.passes) for step in handle.stats.steps] == [(4, 2)] * 3


def test_two_layers_are_two_terms():
    plain = pixel_model()(noise(2, 2, 16, 24), 500).sample
    one, two = SAG(0.7), SAG(0.4, layers="down_blocks.1.attentions.0", blur_sigma=2.0)
    torch.testing.assert_close(once([one, two]) - plain, once(one) + once(two) - 2 * plain, rtol=0, atol=1e-9)


class OneCall(StableDiffusionPipeline):
    """Calls the network once, as a pipeline that guides by itself does."""

    def __call__(self, x, at, text):
        self._guidance_scale = 4.0
        return self.unet(torch.cat([x, x]), at, encoder_hidden_states=text).sample


class Call:
    """A network in float64 and what it is called with, at timestep 600."""

    def __init__(self):
        pipe = sd_model()
        self.pipe = OneCall(**pipe.components, requires_safety_checker=False)
        self.model = self.pipe.unet.double()
        self.text = noise(2, 7, self.model.config.cross_attention_dim, seed=2)
        self.pipe.scheduler.set_timesteps(1000)
        self.x = noise(1, 4, 16, 24)

    def eps(self, x, row):
        return self.model(x, 600, encoder_hidden_states=self.text[[row]]).sample

    def both(self, at=600):
        return self.pipe(self.x, at, self.text)

    def term(self, row):
        """`eps - eps(x~)` of the null row (0) or the conditional row (1)."""
        module, level = self.model.get_submodule(SD_MID), level_of(self.pipe.scheduler, 600)
        guided = guided_eps(lambda x: self.eps(x, row), module, self.x, level, (2, 3), 1.0)
        return guided - self.eps(self.x, row)


def test_with_guidance_of_the_pipeline_the_null_rows_are_degraded():
    call = Call()
    expected = call.both() + 0.6 * call.term(0)
    with guide(call.pipe, SAG(0.6)) as handle:
        torch.testing.assert_close(call.both(), expected, rtol=0, atol=1e-9)
    assert (handle.stats.lanes, handle.stats.passes) == (3, 2)


def test_within_the_interval_of_cfg_the_null_rows_are_degraded():
    call = Call()
    null, cond = call.both()
    expected = null + 3 * (cond - null) + 0.6 * call.term(0)[0]
    with guide(call.pipe, [CFG(3.0, interval=(500, 900)), SAG(0.6)]) as handle:
        torch.testing.assert_close(call.both(), torch.stack([expected, expected]), rtol=0, atol=1e-9)
    assert (handle.stats.lanes, handle.stats.passes) == (3, 2)


def test_outside_of_the_interval_of_cfg_the_conditional_rows_are_degraded():
    call = Call()
    expected = call.eps(call.x, 1) + 0.6 * call.term(1)
    with guide(call.pipe, [CFG(3.0, interval=(0, 300)), SAG(0.6)]) as handle:
        torch.testing.assert_close(call.both(), torch.cat([expected, expected]), rtol=0, atol=1e-9)
        assert (handle.stats.lanes, handle.stats.passes) == (2, 2)
        call.pipe.scheduler.step(call.x, 600, call.x)
        call.both(at=200)  # CFG has to act somewhere


def test_cfg_of_a_loop_leaves_the_conditional_rows_to_be_degraded():
    call = Call()
    null, cond = call.eps(call.x, 0), call.eps(call.x, 1)
    expected = null + 3 * (cond - null) + 0.6 * call.term(1)
    denoiser = Denoiser(call.model, call.pipe.scheduler)
    with guide(denoiser, [CFG(3.0), SAG(0.6)], null={"encoder_hidden_states": call.text[:1]}):
        torch.testing.assert_close(call.eps(call.x, 1), expected, rtol=0, atol=1e-9)


def test_further_input_channels_stay():
    pipe = build("sd")
    model = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9).eval()
    given, seen = noise(2, 9, 16, 24, dtype=torch.float32), []
    model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with guide(Denoiser(model, pipe.scheduler), SAG(threshold=-1.0)):
        model(given, 500, encoder_hidden_states=torch.zeros(2, 7, 16))
    assert torch.equal(seen[0], given)
    assert torch.equal(seen[1][:, 4:], given[:, 4:])
    assert not torch.equal(seen[1][:, :4], given[:, :4])


# What users of other implementations met


def test_euler_and_its_kin_give_the_degraded_lane_the_scaled_input():
    """huggingface/diffusers#5040: the degraded input was not scaled, and float timesteps were refused."""
    for scheduler in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler):
        pipe = sd_model()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
        seen = []
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with guide(pipe, SAG()) as handle:
            latents = latents_of(pipe, guidance_scale=4.0)
        hook.remove()
        assert bool(latents.isfinite().all())
        clean, degraded = seen[0::2], seen[1::2]
        assert len(clean) == len(degraded) == len(handle.stats.steps)
        for own, other in zip(clean, degraded, strict=True):
            assert len(own) == 2 * len(other)
            assert 0.05 < float((other == own[:1]).double().mean()) < 0.95  # pixels outside of the mask


@pytest.mark.parametrize(
    ("size", "prediction_type", "guidance_scale"),
    [((65, 65), "v_prediction", 4.0), ((34, 52), "v_prediction", 1.0), ((13, 30), "epsilon", 4.0)],
)
def test_latents_of_any_size(size, prediction_type, guidance_scale):
    """Sizes not divisible by 64 and v-prediction (Comfy-Org/ComfyUI#2201); 65 x 65 (ComfyUI-Impact-Pack#372)."""
    pipe = sd_model()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    latents = noise(1, 4, *size, dtype=torch.float32)
    plain = latents_of(pipe, steps=2, latents=latents, guidance_scale=guidance_scale)
    with guide(pipe, SAG()):
        guided = latents_of(pipe, steps=2, latents=latents, guidance_scale=guidance_scale)
    assert guided.shape == latents.shape
    assert bool(guided.isfinite().all())
    assert float((guided - plain).abs().max()) > 1e-3


def test_without_an_unconditional_branch():
    """Panchovix/stable-diffusion-webui-reForge#487; and a network that knows no condition at all."""
    pipe = DDIMPipeline(pixel_model(3).float(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images

    plain = images()
    with guide(pipe, SAG(0.5)) as handle:
        guided = images()
    assert abs(guided - plain).max() > 1e-3
    assert (handle.stats.lanes, handle.stats.passes) == (6, 6)


def test_half_precision():
    pipe = sd_model().to(torch.bfloat16)
    with guide(pipe, SAG()):
        latents = latents_of(pipe, guidance_scale=4.0)
    assert latents.dtype == torch.bfloat16
    assert bool(latents.isfinite().all())
