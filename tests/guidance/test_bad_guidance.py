"""What users get wrong, as one table: the error says what came and what to do, and the pipeline is as before."""

import copy
import math

import diffusers
import pytest
import torch

from diffusers_repr import (
    CFG,
    PAG,
    SAG,
    AutoGuidance,
    ClassifierGuidance,
    Denoiser,
    DepthGuidance,
    EnergyGuidance,
    ReadoutGuidance,
    describe,
    guide,
)
from tests.capture.models import hook_count
from tests.guidance.readout_cases import bare, readout
from tests.guidance.test_engine import network_of, run
from tests.testers.guidance import noise
from tests.testers.models import build


def untouched(pipe):
    return hook_count(network_of(pipe)) == 0 and type(pipe.scheduler) is getattr(
        diffusers, type(pipe.scheduler).__name__
    )


def logits(x, timestep):
    return x.mean((2, 3)).repeat(1, 4) * torch.arange(1.0, 5.0)


# Refused by guide(): pipeline, a config or what makes one, message.

AT_ONCE = {
    "layer of diffusers' pag_applied_layers": ("sd", PAG(layers="mid"), r"'mid' .* matches nothing.*'mid_block\.\*'"),
    "joint block of the same": ("sd3", PAG(layers="blocks.1"), r"\['transformer_blocks.1.attn'\]"),
    "block instead of its attention": ("sd", PAG(layers="mid_block"), r"no attention module.*'mid_block\.\*'"),
    "second number": ("sd", PAG(3.0, 2.0), r"got 2.0 \(float\)"),
    "interval above the range": (
        "sd",
        PAG(1.0, interval=(900, 1000)),
        r"interval=\(900, 1000\): timestep 1000 is outside \[0, 999\]",
    ),
    "interval below the range": ("sd", SAG(1.0, interval=(-5, 10)), r"timestep -5 is outside \[0, 999\]"),
    "joint attention": ("flux", SAG(1.0), "SAG is defined for attention among image tokens alone. Use PAG"),
    "linear attention": ("sana", SAG(1.0), "no attention probabilities to read. PAG with perturbation='identity'"),
    "several layers": ("sd", SAG(1.0, layers="*attn1"), "SAG reads the attention of one layer; .*matches 16"),
    "layer of features": ("ddpm", EnergyGuidance(logits, layers="mid"), r"Closest: \['mid_block'\]"),
    "folder of a network": ("ddpm", AutoGuidance("folder"), "a network, a pipeline or a Denoiser; got str"),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_refused_at_once(case):
    name, config, message = AT_ONCE[case]
    pipe = build(name)
    with pytest.raises((TypeError, ValueError), match=message):
        guide(pipe, [PAG(1.0), config])
    assert untouched(pipe)


def test_the_network_alone():
    pipe = build("ddpm")
    with pytest.raises(TypeError, match=r"got UNet2DModel. For a bare network: Denoiser\(model, scheduler\)"):
        guide(pipe.unet, PAG(1.0))
    with pytest.raises(TypeError, match="describe takes a diffusers pipeline or a Denoiser; got UNet2DModel"):
        describe(pipe.unet)
    with pytest.raises(ValueError, match="weaker_model is the guided network itself"):
        guide(pipe, AutoGuidance(pipe.unet))
    assert untouched(pipe)


# Refused by the first call: pipeline, scale of its own guidance, config, message.

IN_A_CALL = {
    "own guidance off": ("sd", 1.0, CFG(3.0), "StableDiffusionPipeline calls .* guidance_scale > 1"),
    "no negative prompt": (
        "flux",
        None,
        CFG(3.0),
        "FluxPipeline calls .* true_cfg_scale > 1 .* negative_prompt",
    ),
    "no condition": ("ddpm", None, CFG(3.0), "takes no guidance_scale.*PAG and SAG need no condition"),
    "interval as shares": (
        "ddpm",
        None,
        PAG(1.0, interval=(0.2, 0.8)),
        r"\(0.2, 0.8\).*timesteps 0 to 500",
    ),
    "class out of range": ("ddpm", None, ClassifierGuidance(logits, 4), r"class_labels must lie in 0\.\.3.*got 4"),
    "no class": (
        "ddpm",
        None,
        ClassifierGuidance(logits),
        r"class_labels=NoneType.*class_labels=\.\.\.\)",
    ),
    "classes of other samples": ("ddpm", None, ClassifierGuidance(logits, [0, 1]), "2 class_labels for 1 samples"),
    "energy without graph": (
        "ddpm",
        None,
        EnergyGuidance(lambda f, x0, c: x0.mean().detach()),
        "without detach",
    ),
    "energy of nothing": ("ddpm", None, EnergyGuidance(lambda f, x0, c: None), "got NoneType"),
    "energy as a map": ("ddpm", None, EnergyGuidance(lambda f, x0, c: x0), r"got shape \(1, 1, 16, 16\)"),
    "image smaller than the blur": ("ddpm", None, SAG(1.0, kernel_size=33), "kernel_size=31 or less fits"),
}


@pytest.mark.parametrize("case", IN_A_CALL)
def test_refused_in_a_call(case):
    name, scale, config, message = IN_A_CALL[case]
    pipe = build(name)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message), guide(pipe, config):
        run(name, pipe, scale)
    assert untouched(pipe)
    assert run(name, pipe, scale).isfinite().all()


def test_gradients_in_inference_mode():
    pipe = build("ddpm")
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"torch.inference_mode\(\); use torch.no_grad"),
        guide(pipe, EnergyGuidance(lambda f, x0, c: x0.mean())),
    ):
        run("ddpm", pipe)
    assert untouched(pipe)
    with torch.inference_mode(), guide(pipe, [PAG(1.0), SAG(1.0)]):
        found = run("ddpm", pipe)
    with guide(pipe, [PAG(1.0), SAG(1.0)]):
        assert torch.equal(run("ddpm", pipe), found)


# Not refused, but told


@pytest.mark.parametrize("update", ["eps", "latent_sign", "latent_adam"])
def test_corrections_that_are_not_finite_are_told(update):
    pipe = build("ddpm")
    config = EnergyGuidance(lambda f, x0, c: x0.mean() * math.nan, update=update)
    message = "EnergyGuidance gave a correction that holds NaN or infinity"
    with pytest.warns(UserWarning, match=message), guide(pipe, config):
        run("ddpm", pipe)
    assert untouched(pipe)


def test_a_run_that_a_callback_ends_before_the_interval():
    pipe = build("short_sd")

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    late = PAG(1.0, interval=(0, 300))
    with guide(pipe, late):
        run("sd", pipe, 3.0, steps=4, callback_on_step_end=callback)
    assert untouched(pipe)
    with guide(pipe, late) as handle:
        run("sd", pipe, 3.0, steps=4)
    assert [bool(step.acted) for step in handle.stats.steps] == [False, False, True, True]


@pytest.mark.parametrize("null", ["", torch.zeros(1, 5, 16)])
def test_a_null_condition_that_is_none(null):
    pipe = build("short_sd")
    with pytest.raises(TypeError, match=r"null= is a condition, such as denoiser.condition\(prompt=''\)"):
        guide(Denoiser.from_pipe(pipe), CFG(3.0), null=null)
    assert untouched(pipe)


# Targets and heads


def test_a_target_of_another_aspect_ratio():
    denoiser = bare()
    head, x = readout(denoiser), noise(1, 2, 16, 24, dtype=torch.float64)
    for options in ({"target": torch.zeros(24, 16)}, {"target": torch.zeros(2, 3), "mask": torch.ones(16, 16)}):
        config = ReadoutGuidance(head, update="eps", **options)
        message = r"(target is 24 x 16|mask is 16 x 16) \(H x W\), the readout of these samples 16 x 24"
        with torch.no_grad(), pytest.raises(ValueError, match=message), guide(denoiser, config):
            denoiser.model(x, 500)
        assert hook_count(denoiser.model) == 0
    for size in ((2, 3), (160, 240), (15, 24), (17, 24)):
        with torch.no_grad(), guide(denoiser, ReadoutGuidance(head, torch.zeros(size), update="eps")):
            denoiser.model(x, 500)


def test_one_head_as_both():
    head = readout(bare())
    with pytest.raises(ValueError, match="weak is the strong head itself"):
        DepthGuidance(head, head)


# Changes under the guidance's feet


def test_what_is_saved_or_copied_while_guided_is_plain(tmp_path):
    pipe = build("short_sd")
    plain = run("sd", pipe, 3.0)
    with guide(pipe, [PAG(2.0), CFG(4.0)]) as handle:
        pipe.save_pretrained(tmp_path)
        other = copy.deepcopy(pipe)
        loaded = type(pipe).from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(run("sd", loaded, 3.0), plain)
        assert torch.equal(run("sd", other, 3.0), plain)
        assert not handle.stats.calls
        guided = run("sd", pipe, 3.0)
        with guide(other, [PAG(2.0), CFG(4.0)]):
            assert torch.equal(run("sd", other, 3.0), guided)
    assert untouched(pipe)
    assert torch.equal(run("sd", pipe, 3.0), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_callbacks_that_raise(error):
    pipe = build("short_sd")
    plain = run("sd", pipe, 3.0)

    def callback(pipe, step, timestep, tensors):
        raise error("mine")

    handle = guide(pipe, [PAG(2.0), SAG(0.5)])
    expected = run("sd", pipe, 3.0)
    with pytest.raises(error, match="mine"):
        run("sd", pipe, 3.0, callback_on_step_end=callback)
    assert torch.equal(run("sd", pipe, 3.0), expected)
    handle.remove()
    handle.remove()
    assert untouched(pipe)
    assert torch.equal(run("sd", pipe, 3.0), plain)


def test_dtype_changed_while_guided():
    pipe = build("ddpm")
    with guide(pipe, PAG(2.0)):
        pipe.unet.to(torch.float64)
        found = run("ddpm", pipe)
    pipe = build("ddpm")
    pipe.unet.to(torch.float64)
    with guide(pipe, PAG(2.0)):
        assert torch.equal(run("ddpm", pipe), found)
