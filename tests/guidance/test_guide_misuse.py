"""Guidance that could not act says so: at once where it can, at the end of the run where not; nothing is changed."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FasterCacheConfig,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.hooks import HookRegistry, apply_faster_cache
from torch import nn

from diffusers_repr import CFG, PAG, SAG, guide
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import NoiseLevel
from tests.capture.models import hook_count
from tests.guidance.test_engine import network_of, run
from tests.testers.guidance import noise, toy_denoiser
from tests.testers.models import build


@pytest.fixture(autouse=True)
def dynamo():
    yield
    torch._dynamo.reset()


def untouched(pipe):
    return (
        hook_count(network_of(pipe)) == 0
        and type(pipe.scheduler) in type(pipe.scheduler).__mro__[:1]
        and "step" not in vars(pipe.scheduler)
    )


# Settings


@pytest.mark.parametrize("cls", [PAG, SAG, CFG])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": math.nan}, ValueError, r"{name}.scale must be finite; got nan"),
        ({"scale": math.inf}, ValueError, r"{name}.scale must be finite; got inf"),
        ({"scale": "3"}, TypeError, r"{name}.scale must be a number; got '3' \(str\)"),
        ({"scale": True}, TypeError, r"{name}.scale must be a number; got True \(bool\)"),
        ({"scale": None}, TypeError, r"{name}.scale must be a number; got None"),
        ({"scale": torch.tensor([1.0, 2.0])}, TypeError, r"{name}.scale must be a number; got tensor"),
        ({"adaptive": math.nan}, ValueError, r"{name}.adaptive must be finite; got nan"),
        ({"adaptive": -0.1}, ValueError, r"adaptive must be at least 0; got -0.1"),
        ({"scale": -1.0, "adaptive": 0.1}, ValueError, r"adaptive lets a positive scale fall to 0; got scale=-1.0"),
        ({"interval": (900, 100)}, ValueError, r"interval=\(900, 100\) is the wrong way round: give \(low, high\)"),
        ({"interval": (NoiseLevel(nsr=2.0), NoiseLevel(nsr=1.0))}, ValueError, "is the wrong way round"),
        ({"interval": (0, math.nan)}, ValueError, "An end of interval must be finite; got nan"),
        ({"interval": (0, math.inf)}, ValueError, "An end of interval must be finite; got inf"),
        ({"interval": ("0", 5)}, TypeError, r"An end of interval must be a number; got '0' \(str\)"),
        ({"interval": 0.5}, ValueError, r"interval must be \(low, high\), two noise levels; got 0.5"),
        ({"interval": (1, 2, 3)}, ValueError, r"interval must be \(low, high\), two noise levels; got \(1, 2, 3\)"),
        (
            {"interval": (0, NoiseLevel(nsr=torch.tensor([1.0, 2.0])))},
            ValueError,
            "An end of interval is one noise level; got .* with one per sample",
        ),
    ],
)
def test_settings(cls, changes, error, message):
    with pytest.raises(error, match=message.format(name=cls.__name__)):
        cls(**changes)
    with pytest.raises(error, match=message.format(name=cls.__name__)):
        cls().replace(**changes)


MIXED = [
    (900, NoiseLevel(timestep=100)),
    (NoiseLevel(timestep=900), 100),
    (NoiseLevel(timestep=900), NoiseLevel(timestep=100)),
    (NoiseLevel(half_log_snr=-2.0), NoiseLevel(half_log_snr=2.0)),
    (NoiseLevel(nsr=3.0), 100),
]


@pytest.mark.parametrize("name", ["ddim", "sd3"])
def test_reversed_intervals_of_other_kinds_are_seen_with_the_model(name):
    pipe = build(name)
    for interval in MIXED:
        with pytest.raises(ValueError, match="is the wrong way round: give"):
            guide(pipe, PAG(1.0, interval=interval))
        assert untouched(pipe)
        with guide(pipe, PAG(1.0, interval=interval[::-1])) as handle:
            run(name, pipe, 1.0 if name == "sd3" else None, steps=4)
        assert 0 < sum(bool(step.acted) for step in handle.stats.steps) <= 4


def test_intervals_of_every_kind_mean_the_same():
    pipe = build("short_sd")
    level = Denoiser.from_pipe(pipe).level
    low, high = level(201), level(601)
    kinds = [
        (201, 601),
        (low, high),
        (201.0, NoiseLevel(nsr=high.nsr)),
        (NoiseLevel(half_log_snr=low.half_log_snr), NoiseLevel(timestep=601)),
    ]
    acted = []
    for interval in kinds:
        with guide(pipe, PAG(1.0, interval=interval)) as handle:
            run("sd", pipe, 1.0, steps=10)
        acted.append([float(step.level.timestep) for step in handle.stats.steps if step.acted])
    assert acted == [[601.0, 501.0, 401.0, 301.0, 201.0]] * 4


def test_both_ends_of_an_interval_are_in_it_for_flow_models():
    """A flow sampler's sigmas are in float32; an end at a step's timestep holds that step."""
    pipe = build("sd3")
    with guide(pipe, PAG(1.0)) as handle:
        run("sd3", pipe, 1.0, steps=12)
    times = [float(step.level.timestep) for step in handle.stats.steps][1:]
    for at in times:
        with guide(pipe, PAG(1.0, interval=(round(at, 3), round(at, 3)))) as handle:
            run("sd3", pipe, 1.0, steps=12)
        assert sum(bool(step.acted) for step in handle.stats.steps) == 1


def test_adaptive_scale_falls_with_the_noise():
    pipe = build("short_sd")
    config = PAG(3.0, adaptive=0.005)
    term = config.bind(Denoiser.from_pipe(pipe))
    level = Denoiser.from_pipe(pipe).level
    assert [term.weight(level(t)) for t in (999, 700, 500, 400, 100)] == pytest.approx([2.995, 1.5, 0.5, 0, 0])
    with pytest.raises(ValueError, match="CFG has no adaptive scale; give it an interval"):
        CFG(3.0, adaptive=0.1)


# What is guided


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (object(), "guide takes a diffusers pipeline or a Denoiser; got object"),
        (None, "guide takes a diffusers pipeline or a Denoiser; got NoneType"),
        (nn.Linear(2, 2), r"For a bare network: Denoiser\(model, scheduler\)"),
    ],
)
def test_targets_that_are_none(target, message):
    with pytest.raises(TypeError, match=message):
        guide(target, PAG(1.0))


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        ([], ValueError, r"No guidance was given: guide\(pipe, \[PAG\(3.0\)\]\)"),
        ("PAG", TypeError, r"A guidance is a config such as PAG\(3.0\), or a list of them; got 'PAG' \(str\)"),
        (3.0, TypeError, r"A guidance is a config such as PAG\(3.0\), or a list of them; got 3.0 \(float\)"),
        (PAG, TypeError, r"A guidance is a config such as PAG\(3.0\).*got <class"),
        ([PAG], TypeError, r"A guidance is a config such as PAG\(3.0\); got <class"),
        ([PAG(1.0), None], TypeError, r"A guidance is a config such as PAG\(3.0\); got None"),
        ([CFG(2.0), CFG(3.0)], ValueError, "which there is one of; got 2"),
    ],
)
def test_guidances_that_are_none(guidance, error, message):
    pipe = build("short_sd")
    with pytest.raises(error, match=message):
        guide(pipe, guidance)
    assert untouched(pipe)


def test_arguments_for_loops():
    pipe = build("short_sd")
    with pytest.raises(ValueError, match="scheduler= and null= are for a loop of your own"):
        guide(pipe, PAG(1.0), scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="null= is the null condition of CFG, and no CFG was given"):
        guide(Denoiser.from_pipe(pipe), PAG(1.0), null={})
    assert untouched(pipe)


def test_guided_already():
    pipe = build("short_sd")
    with guide(pipe, PAG(1.0)):
        hooks = hook_count(pipe.unet)
        for target in (pipe, Denoiser.from_pipe(pipe)):
            with pytest.raises(ValueError, match=r"UNet2DConditionModel is guided already.*handle.remove\(\)"):
                guide(target, CFG(2.0))
        assert hook_count(pipe.unet) == hooks
        run("sd", pipe, 1.0)
    handle = guide(pipe, CFG(2.0))
    handle.remove()
    with pytest.raises(RuntimeError, match="This guidance was removed; make another"), handle:
        pytest.fail("the block was entered")
    assert untouched(pipe)


def test_pipelines_with_lanes_of_their_own():
    parts = {**build("short_sd").components, "requires_safety_checker": False}
    for cls in (StableDiffusionSAGPipeline, StableDiffusionInstructPix2PixPipeline):
        accepted = {k: v for k, v in parts.items() if k in ("requires_safety_checker", *cls._get_signature_types())}
        pipe = cls(**accepted)
        with pytest.raises(ValueError, match=f"{cls.__name__} has more than a conditional and a null lane"):
            guide(pipe, PAG(1.0))
        assert untouched(pipe)
    pag = StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid")
    pag.set_progress_bar_config(disable=True)
    with (
        pytest.raises(ValueError, match="perturbs attention by itself; call it with pag_scale=0"),
        guide(pag, PAG(1.0)),
    ):
        run("sd", pag, 3.0, pag_scale=2.0)
    plain = build("short_sd")
    with guide(plain, PAG(1.0)):
        expected = run("sd", plain, 3.0)
    pag.unet.set_attn_processor(plain.unet.attn_processors)  # an error leaves diffusers' own in place
    with guide(pag, PAG(1.0)):
        assert torch.equal(run("sd", pag, 3.0, pag_scale=0.0), expected)


# Networks that hooks do not reach


def test_compiled_networks_are_refused():
    pipe = build("ddpm")
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"is compiled; .* pipe.unet = pipe.unet._orig_mod"):
        guide(pipe, PAG(1.0))
    pipe.unet = plain
    plain.mid_block.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"mid_block .* is compiled"):
        guide(pipe, PAG(1.0))
    plain.mid_block._compiled_call_impl = None
    plain.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="is compiled; .* load it anew"):
        guide(pipe, PAG(1.0))
    plain._compiled_call_impl = None
    assert untouched(pipe)
    guide(pipe, PAG(1.0)).remove()


def test_a_network_compiled_or_replaced_while_guided():
    pipe = build("ddpm")
    plain = pipe.unet
    handle = guide(pipe, PAG(1.0))
    with torch.compiler.set_stance("force_eager"):
        plain.compile()
        with pytest.raises(RuntimeError, match="compiled its network after it was guided, and nothing would be"):
            run("ddpm", pipe)
        plain._compiled_call_impl = None
        pipe.unet = torch.compile(plain)
        with pytest.raises(RuntimeError, match="compiled its network after it was guided"):
            run("ddpm", pipe)
    pipe.unet = build("ddpm").unet
    with pytest.raises(RuntimeError, match="has another network than was guided"):
        run("ddpm", pipe)
    handle.remove()
    run("ddpm", pipe)


def compile_a_block(network):
    network.transformer_blocks[1].compile(backend="eager")
    return lambda: setattr(network.transformer_blocks[1], "_compiled_call_impl", None)


def compile_repeated_blocks(network):
    network.compile_repeated_blocks(backend="eager")
    return lambda: [setattr(m, "_compiled_call_impl", None) for m in network.modules() if m._compiled_call_impl]


def replace_by_a_compiled_one(network):
    plain = network.transformer_blocks[1]
    network.transformer_blocks[1] = torch.compile(plain, backend="eager")
    return lambda: network.transformer_blocks.__setitem__(1, plain)


def faster_cache():
    return FasterCacheConfig(
        current_timestep_callback=lambda: 9, attention_weight_callback=lambda module: 0.5, is_guidance_distilled=True
    )


def enable_a_cache(network):
    network.enable_cache(faster_cache())
    return network.disable_cache


def apply_a_cache(network):
    apply_faster_cache(network, faster_cache())
    registry = HookRegistry.check_if_exists_or_initialize(network)
    return lambda: [registry.remove_hook(f"faster_cache_{part}", recurse=True) for part in ("denoiser", "block")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (compile_a_block, RuntimeError, r"transformer_blocks.1 .* is compiled"),
        (compile_repeated_blocks, RuntimeError, r"transformer_blocks.[01] .* is compiled"),
        (replace_by_a_compiled_one, RuntimeError, r"transformer_blocks.1 \(OptimizedModule\) is compiled"),
        (enable_a_cache, ValueError, r"caches activations between steps.*faster_cache keeps.*disable_cache\(\)"),
        (
            apply_a_cache,
            ValueError,
            r"caches activations between steps \(faster_cache_.*further pass of PAG; remove its",
        ),
    ],
)
def test_compiled_parts_and_caches_are_refused_whenever_they_come(change, error, message):
    """Before `guide`, after it, between two runs, and in a loop of one's own."""
    pipe, config = build("flux"), PAG(1.0, layers="transformer_blocks.1.attn")
    undo = change(pipe.transformer)
    with pytest.raises(error, match=message):
        guide(pipe, config)
    undo()
    handle = guide(pipe, config)
    for _ in range(2):
        undo = change(pipe.transformer)
        with pytest.raises(error, match=message):
            run("flux", pipe, 1.0, steps=1)
        undo()
        guided = run("flux", pipe, 1.0, steps=1)
    handle.remove()
    assert untouched(pipe)
    denoiser = Denoiser.from_pipe(pipe)
    x, condition = noise(1, 4, 16, 16), denoiser.condition(batch=1, size=(32, 32))
    with torch.no_grad(), guide(denoiser, config):
        for timestep in (500, 400):
            denoiser.predict(x, timestep, condition)
        undo = change(pipe.transformer)
        with pytest.raises(error, match=message):  # the noise does not fall: another run
            denoiser.predict(x, 500, condition)
        undo()
    with guide(pipe, config):
        assert torch.equal(run("flux", pipe, 1.0, steps=1), guided)


def test_a_block_without_a_call_raises():
    pipe = build("ddim")
    with pytest.raises(RuntimeError, match="Nothing was guided: the network was not called"), guide(pipe, PAG(1.0)):
        pass
    with pytest.raises(RuntimeError, match="Nothing was guided"), guide(Denoiser.from_pipe(pipe), PAG(1.0)):
        pipe.unet.forward(noise(1, 3, 16, 16), 5)
    with guide(pipe, PAG(0.0)):
        pass  # all off: nothing was to be guided
    with pytest.raises(ZeroDivisionError), guide(pipe, PAG(1.0)):
        _ = 1 / 0


def test_an_interval_that_holds_no_step():
    pipe = build("ddim")
    message = r"PAG did not act in any of 2 network calls: its interval \(600, 700\)"
    with pytest.raises(RuntimeError, match=message), guide(pipe, PAG(1.0, interval=(600, 700))):
        run("ddim", pipe)
    handle = guide(pipe, [PAG(1.0), PAG(1.0, interval=(600, 700), perturbation="drop")])
    run("ddim", pipe)
    with pytest.raises(RuntimeError, match=r"PAG\[1\] did not act"):
        run("ddim", pipe)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"PAG did not act .*adaptive=1.0"), guide(pipe, PAG(1.0, adaptive=1.0)):
        run("ddim", pipe)
    assert untouched(pipe)


# Rows that are not known


def test_a_loop_of_ones_own_over_a_guided_pipeline():
    """With its batch doubled nobody tells which half is which; without, rows are conditional."""
    pipe = build("short_sd")
    x, embeds = noise(1, 4, 16, 16), torch.zeros(2, 5, 16)
    pipe.scheduler.set_timesteps(4)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="A loop of your own calls .* two equal halves"),
        guide(pipe, PAG(1.0)),
    ):
        pipe.unet(torch.cat([x] * 2), 751, encoder_hidden_states=embeds)
    run("sd", pipe, 5.0)  # which leaves a guidance scale on the pipeline
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad(), guide(pipe, PAG(1.0)) as handle:
        pipe.unet(noise(2, 4, 16, 16), 751, encoder_hidden_states=embeds)
    assert handle.stats.lanes == 2


def test_a_second_call_at_a_step_is_the_null_condition_of_a_loop():
    """Its prediction gets the same correction, so that their difference is as ever."""
    scheduler = DDIMScheduler(clip_sample=False)
    unet = build("class_unet").unet
    denoiser = Denoiser(unet, scheduler)
    scheduler.set_timesteps(4)
    x, cond, null = noise(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([0, 0])
    with torch.no_grad():
        plain = [unet(x, 750, labels).sample for labels in (cond, null)]
        with guide(denoiser, PAG(2.0), scheduler=scheduler) as handle:
            guided = [unet(x, 750, labels).sample for labels in (cond, null)]
            scheduler.step(guided[0], 750, x)
            other = unet(noise(2, 3, 16, 16, seed=1), 500, cond).sample
            y = noise(2, 3, 16, 16, seed=2)  # other samples: no second call
            again = unet(y, 500, cond).sample
            unet(y.add_(1), 500, cond)
    change = guided[0] - plain[0]
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(guided[1] - plain[1], change, rtol=1e-4, atol=1e-6)
    assert [step.lanes for step in handle.stats.steps] == [2, 1, 2, 2, 2]
    assert not torch.equal(other, again)


def test_toy_denoisers_without_attention():
    from tests.testers.guidance import Linear

    denoiser = toy_denoiser(Linear(), DDIMScheduler())
    with pytest.raises(ValueError, match="no self-attention"):
        guide(denoiser, PAG(1.0))
