"""Calls of the network that guidance must not lose: other schedulers, other readers, other layouts of latents."""

import copy
import warnings

import pytest
import torch
from torch import nn

from diffusers_repr import CFG, PAG, EnergyGuidance, guide
from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from tests.guidance.test_engine import run
from tests.testers.guidance import noise
from tests.testers.models import build


def power(features, x0, condition):
    return x0.square().mean((1, 2, 3))


def moving():
    return EnergyGuidance(power, update="latent_sign", scale=0.01)


def image_of(pipe):
    config = pipe.unet.config
    return 1, config.in_channels, config.sample_size, config.sample_size


@pytest.mark.parametrize("side", [32, 64])
def test_latents_of_flux_are_moved_in_their_tokens(side):
    """More rows of latents than a token has values, and fewer: the scheduler steps from where the network was."""
    pipe, seen = build("flux"), {}
    network = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(network=kwargs["hidden_states"]), with_kwargs=True
    )
    step = pipe.scheduler.step

    def stepped(model_output, timestep, sample, **settings):
        seen["step"], seen["own"] = sample, seen["network"]
        return step(model_output, timestep, sample, **settings)

    pipe.scheduler.step = stepped
    call = {"num_inference_steps": 1, "height": side, "width": side, "output_type": "latent", "guidance_scale": 1.0}
    with guide(pipe, moving()):
        pipe("a cat", generator=torch.Generator().manual_seed(0), **call)
    network.remove()
    change = seen["step"] - seen["own"]
    assert seen["step"].shape == (1, (side // 4) ** 2, 16)
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.01), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guidance", [moving(), CFG(3.0)], ids=["moved latents", "null condition to come"])
def test_a_loop_that_steps_another_scheduler(guidance):
    name = "ddim" if isinstance(guidance, EnergyGuidance) else "class_unet"
    pipe = build(name)
    denoiser, other, x = Denoiser.from_pipe(pipe), copy.deepcopy(pipe.scheduler), noise(*image_of(pipe))
    extra = {} if name == "ddim" else {"class_labels": torch.tensor([1])}
    other.set_timesteps(3)
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match=r"its DDIMScheduler was not stepped after the last call: .* scheduler=\)"),
        guide(denoiser, guidance, scheduler=pipe.scheduler),
        torch.no_grad(),
    ):
        for t in other.timesteps:
            x = other.step(pipe.unet(x, t, **extra).sample, t, x).prev_sample


@pytest.mark.parametrize("name", ["sd", "dit", "pixart"])
def test_a_pipeline_that_guides_by_itself_over_a_guided_denoiser(name):
    """Its rows without condition would be guided as if they had one."""
    pipe = build(name)
    with pytest.raises(ValueError, match=r"was given a Denoiser, but a \w+Pipeline calls"):  # noqa: SIM117
        with guide(Denoiser.from_pipe(pipe), PAG(2.0)):
            run(name, pipe, 4.0)


@pytest.mark.parametrize(("name", "scale"), [("sd", 1.0), ("dit", 1.0), ("ddim", None)])
def test_a_pipeline_without_guidance_of_its_own_over_a_guided_denoiser(name, scale):
    pipe = build(name)
    with guide(pipe, PAG(2.0)):
        expected = run(name, pipe, scale)
    with guide(Denoiser.from_pipe(pipe), PAG(2.0)):
        assert torch.equal(run(name, pipe, scale), expected)


@pytest.mark.parametrize(
    ("name", "two", "one"),
    [
        ("pixart", {"prompt": ["a cat", "a dog"], "negative_prompt": ""}, {"prompt": "a cat", "negative_prompt": ""}),
        ("dit", {"class_labels": [207, 1000]}, {"class_labels": [207]}),
    ],
)
def test_equal_seeds_without_guidance_are_no_guided_batch(name, two, one):
    """Two samples from the same noise, the second of DiT with the null class: conditions of their own all the same."""
    pipe = build(name)
    size = {"height": 32, "width": 48, "use_resolution_binning": False} if name == "pixart" else {}
    call = {**size, "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "np"}

    def seeds(count):
        return [torch.Generator().manual_seed(0) for _ in range(count)]

    with guide(pipe, PAG(2.0)) as handle:
        both = pipe(**two, **call, generator=seeds(2)).images
        assert [step.lanes for step in handle.stats.steps] == [2, 2]
        alone = pipe(**one, **call, generator=seeds(1)).images
    torch.testing.assert_close(torch.as_tensor(both[:1]), torch.as_tensor(alone), rtol=1e-4, atol=1e-5)


def test_a_run_that_was_broken_off_is_not_told_to_have_changed_nothing():
    pipe = build("sd")

    def stop(pipeline, step, timestep, tensors):
        raise InterruptedError

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handle = guide(pipe, EnergyGuidance(lambda features, x0, condition: 0 * x0.mean()))
        with pytest.raises(InterruptedError):
            run("sd", pipe, 1.0, steps=3, callback_on_step_end=stop)
        handle.remove()
    assert not [warning for warning in told if "changed nothing" in str(warning.message)]


def test_a_block_that_captures_another_network_hides_nothing():
    pipe = build("ddim")
    reader = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with guide(pipe, PAG(2.0)) as handle:
        expected = run("ddim", pipe)
        with capture(reader, "0") as tape:
            found = run("ddim", pipe)
            reader(torch.zeros(1, 2))
        assert tape.complete
        assert torch.equal(found, expected)
        calls = handle.stats.calls
        with capture(pipe.unet, "mid_block"):  # nobody gets its output
            pipe.unet(noise(*image_of(pipe)), 5)
        assert handle.stats.calls == calls


def test_the_warning_of_no_effect_names_the_line_of_the_user():
    pipe = build("ddim")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with guide(pipe, EnergyGuidance(lambda features, x0, condition: 0 * x0.mean())):
            run("ddim", pipe)
    assert [warning.filename for warning in told if "changed nothing" in str(warning.message)] == [__file__]
