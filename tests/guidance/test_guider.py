"""Guiders in diffusers' SDXL modular pipeline: equal to `guide` on the classic one, and what they cannot express."""

import contextlib
import json
import math
import warnings

import pytest
import torch
from diffusers import ClassifierFreeGuidance, EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline import BlockState

from diffusers_repr import (
    CFG,
    PAG,
    SAG,
    AutoGuidance,
    ClassifierGuidance,
    DepthGuidance,
    EnergyGuidance,
    ReadoutGuidance,
    guide,
)
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance import Blur, Mask
from diffusers_repr.guidance.modular import AutoGuidanceGuider, CFGGuider, PAGGuider
from diffusers_repr.noise import NoiseLevel
from tests.testers.guidance import Counter, noise
from tests.testers.hosts import newer, text_to_image
from tests.testers.models import build

STEPS, MIDDLE = 4, (300, 800)  # two of the four timesteps: 666 and 333
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def pipe():
    """The classic pipeline."""
    return build("sdxl")


def modular(pipe, guider, blocks=None, **components):
    """The modular pipeline with the same components."""
    made = text_to_image(blocks or StableDiffusionXLAutoBlocks())
    taken = {name: part for name, part in {**pipe.components, **components}.items() if name in made.component_names}
    made.update_components(**taken, guider=guider)
    made.set_progress_bar_config(disable=True)
    return made


def latents(rows=2):
    return noise(rows, 4, 8, 12)


def run(pipe, guider, steps=STEPS, **components):
    """Latents of the modular pipeline."""
    made = modular(pipe, guider, **components)
    return sample(made, steps)


def sample(made, steps=STEPS):
    return made(
        prompt=["a cat", "two dogs"],
        negative_prompt=["a tree", "a tree"],
        num_inference_steps=steps,
        latents=latents(),
        height=32,
        width=48,
        output="latents",
    )


def classic(pipe, guidance, scale):
    """Latents of the classic pipeline under `guide`."""
    with guide(pipe, guidance) if guidance else contextlib.nullcontext():
        return pipe(
            ["a cat", "two dogs"],
            negative_prompt=["a tree", "a tree"],
            guidance_scale=scale,
            num_inference_steps=STEPS,
            latents=latents(),
            height=32,
            width=48,
            output_type="latent",
        ).images


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def untouched(model):
    """Whether no hook and no changed forward is left."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and not any("forward" in m.__dict__ for m in model.modules())


# Equal to `guide`


@pytest.mark.parametrize(
    ("config", "cfg"),
    [
        (PAG(3.0), 1.0),
        (PAG(3.0), 5.0),
        (PAG(2.0, perturbation="drop", layers="up_blocks.0.*.attn1"), 5.0),
        (PAG(2.0, perturbation=Blur(0.8)), 1.0),
        (PAG(2.0, perturbation=Mask(0.5, seed=3), interval=MIDDLE), 5.0),
        (PAG(3.0, adaptive=0.004), 1.0),
    ],
    ids=["alone", "cfg", "drop", "blur", "mask", "adaptive"],
)
def test_pag_equals_guide_on_the_classic_pipeline(pipe, config, cfg):
    expected = classic(pipe, [config], cfg)
    found = run(pipe, config.as_guider(cfg=cfg))
    close(found, expected)
    assert (found - classic(pipe, [], cfg)).abs().max() > 1e-2
    assert untouched(pipe.unet)


@pytest.mark.parametrize("config", [CFG(5.0), CFG(5.0, interval=MIDDLE), CFG(5.0, interval=MIDDLE, rescale=0.7)])
def test_cfg_equals_guide_on_the_classic_pipeline(pipe, config):
    with Counter(pipe.unet) as counter:
        found = run(pipe, config.as_guider())
    assert counter.calls == (STEPS + 2 if config.interval else 2 * STEPS)  # no null outside of the interval
    close(found, classic(pipe, [config], 2.0))
    assert (found - classic(pipe, [], 1.0)).abs().max() > 1e-2


def test_cfg_with_an_interval_beside_pag(pipe):
    cfg, pag = CFG(5.0, interval=MIDDLE, rescale=0.5), PAG(3.0, interval=(0, 600))
    with Counter(pipe.unet) as counter:
        found = run(pipe, pag.as_guider(cfg))
    assert counter.calls == STEPS + 2 + 2
    close(found, classic(pipe, [cfg, pag], 2.0))


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_autoguidance_equals_guide_on_the_classic_pipeline(pipe, cfg):
    weak = build("sdxl").unet
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    config = AutoGuidance(weak, scale=1.5, interval=(0, 800))
    with Counter(pipe.unet) as strong, Counter(weak) as weaker:
        found = run(pipe, config.as_guider(cfg=cfg))
    assert (strong.calls, weaker.calls) == ((1 + (cfg != 1)) * STEPS + 3, 3)  # the worse call goes to the weak one
    close(found, classic(pipe, [config], cfg))
    assert untouched(pipe.unet)
    assert untouched(weak)


def test_pag_equals_guide_on_joint_attention():
    """SD3's modular pipeline: image tokens are perturbed, text tokens are not."""
    pipe, config = build("sd3"), PAG(2.0)
    call = {
        "prompt": ["a cat"],
        "negative_prompt": ["a tree"],
        "num_inference_steps": 3,
        "latents": noise(1, 4, 16, 24),
        "height": 32,
        "width": 48,
    }
    made = modular(
        pipe, config.as_guider(cfg=4.0), blocks=newer("diffusers.modular_pipelines", "StableDiffusion3AutoBlocks")()
    )
    found = made(**call, output="latents")
    stock = pipe(**call, guidance_scale=4.0, output_type="latent").images
    with guide(pipe, config):
        expected = pipe(**call, guidance_scale=4.0, output_type="latent").images
    close(found, expected)
    assert (found - stock).abs().max() > 1e-2
    assert untouched(pipe.transformer)


# What is run


def predictions(pipe, guider, scale=1.0):
    """The predictions of one step, from the loop's own calls, by lane."""
    got = {}
    inner = guider.forward

    def forward(**kwargs):
        got.update(kwargs)
        return inner(**kwargs)

    guider.forward = forward
    run(pipe, guider, steps=1)
    return got


def test_the_perturbed_lane_has_the_condition_and_the_perturbation(pipe):
    alone = predictions(pipe, PAG(3.0).as_guider())
    assert list(alone) == ["pred_cond", "pred_negative"]
    both = predictions(pipe, PAG(3.0).as_guider(cfg=5.0))
    assert list(both) == ["pred_cond", "pred_uncond", "pred_negative"]
    for key, value in alone.items():
        assert torch.equal(both[key], value)
    worse = both["pred_negative"]
    assert (worse - both["pred_cond"]).abs().max() > 1e-3
    assert (worse - both["pred_uncond"]).abs().max() > 1e-3
    # by another route: the value projection alone, as a replaced forward of the module
    attention = pipe.unet.get_submodule(MID)
    attention.forward = lambda hidden_states, **_: attention.to_out[0](attention.to_v(hidden_states))
    layers = [path for path, _ in pipe.unet.named_modules() if path.startswith("mid_block") and path.endswith("attn1")]
    for path in layers[1:]:
        other = pipe.unet.get_submodule(path)
        other.forward = lambda hidden_states, other=other, **_: other.to_out[0](other.to_v(hidden_states))
    close(predictions(pipe, CFG(1.0).as_guider())["pred_cond"], worse)


@pytest.mark.parametrize(("scale", "guider"), [(1.0, PAG(0.0).as_guider()), (5.0, PAG(0.0).as_guider(cfg=5.0))])
def test_scale_zero_is_the_stock_guider(pipe, scale, guider):
    with Counter(pipe.unet) as stock:
        expected = run(pipe, ClassifierFreeGuidance(guidance_scale=scale))
    with Counter(pipe.unet) as counter:
        found = run(pipe, guider)
    assert torch.equal(found, expected)
    assert counter.calls == stock.calls


def test_linear_in_the_scale(pipe):
    off, one, two = (run(pipe, PAG(scale).as_guider(), steps=1) for scale in (0.0, 1.0, 2.0))
    close(two - one, one - off)


def test_a_second_run_is_as_the_first(pipe):
    """Also where the first ended with its null condition off, which it needs again."""
    made = modular(pipe, PAG(3.0, interval=(0, 600)).as_guider(CFG(5.0, interval=(600, 999))))
    assert torch.equal(sample(made), sample(made))


def test_half_precision_is_kept():
    guider = PAG(3.0).as_guider(cfg=5.0)
    guider.set_state(0, 1, torch.tensor(500.0))
    cond, null, worse = (noise(1, 4, 8, 8, seed=seed).bfloat16() for seed in range(3))
    pred = guider.forward(pred_cond=cond, pred_uncond=null, pred_negative=worse).pred
    assert pred.dtype == torch.bfloat16
    exact = null.double() + 5 * (cond - null).double() + 3 * (cond.double() - worse.double())
    torch.testing.assert_close(pred.double(), exact, rtol=2e-2, atol=6e-2)


# The interface


def batches(guider):
    pair = (torch.ones(1), torch.zeros(1))
    return guider.prepare_inputs({"prompt_embeds": pair, "mask": (None, None), "x": torch.ones(2)})


def test_which_lane_is_prepared():
    """Pipelines with ControlNet in guess mode ask, between `prepare_models` and the call."""
    guider = PAG(3.0).as_guider(cfg=5.0)
    guider.set_state(0, 4, torch.tensor(999.0))
    made = batches(guider)
    assert [batch.prompt_embeds.item() for batch in made] == [1.0, 0.0, 1.0]
    assert [batch.x.shape[0] for batch in made] == [2, 2, 2]
    model = build("sdxl").unet
    told = []
    for _ in made:
        guider.prepare_models(model)
        told.append(guider.is_conditional)
        guider.cleanup_models(model)
    assert told == [True, False, True]
    assert untouched(model)


def test_conditions_from_names_of_fields():
    guider = PAG(3.0).as_guider(cfg=5.0)
    guider.set_state(0, 4, torch.tensor(999.0))
    data = BlockState(embeds=torch.ones(1), negative=torch.zeros(1), size=torch.full((1,), 7.0))
    made = guider.prepare_inputs_from_block_state(data, {"prompt": ("embeds", "negative"), "size": "size"})
    assert [(batch.prompt.item(), batch.size.item()) for batch in made] == [(1, 7), (0, 7), (1, 7)]
    with pytest.raises(ValueError, match="needs the null condition"):
        guider.prepare_inputs_from_block_state(BlockState(embeds=torch.ones(1)), {"prompt": ("embeds", "negative")})


def test_the_null_condition_is_asked_for_only_with_cfg():
    assert PAG(3.0).as_guider().num_conditions == 1
    assert PAG(3.0).as_guider(cfg=5.0).num_conditions == 2
    assert CFG(5.0, interval=(0, 10)).as_guider().num_conditions == 2
    assert CFG(1.0).as_guider().num_conditions == 1
    guider = CFG(5.0).as_guider()
    guider.disable()
    assert guider.num_conditions == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(pipe, error):
    expected = classic(pipe, [], 5.0)

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:  # cond, null, perturbed
            raise error

    calls = []
    handle = pipe.unet.up_blocks[1].register_forward_hook(fail)  # after the perturbed layer
    with pytest.raises(error):
        run(pipe, PAG(3.0).as_guider(cfg=5.0))
    handle.remove()
    assert untouched(pipe.unet)
    assert torch.equal(classic(pipe, [], 5.0), expected)


def test_a_forward_that_was_replaced_comes_back(pipe):
    inner = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    own = pipe.unet.forward
    run(pipe, PAG(3.0).as_guider(), steps=2)
    assert pipe.unet.forward is own


# Settings


GUIDERS = {
    "cfg": CFG(5.0, interval=(100, 900), rescale=0.5).as_guider(),
    "pag": PAG(2.0, MID, Blur(0.7), interval=(100, 900), adaptive=0.001).as_guider(CFG(4.0, interval=(0, 500))),
    "blur": PAG(perturbation=Blur()).as_guider(),
    "mask": PAG(perturbation=Mask(0.5, seed=3), layers=[MID]).as_guider(),
    "identity": PAG().as_guider(),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_saved_and_loaded(tmp_path, name):
    guider = GUIDERS[name]
    guider.save_pretrained(str(tmp_path))

    def strict(text):
        raise AssertionError(text)

    json.loads((tmp_path / "guider_config.json").read_text(), parse_constant=strict)
    loaded = type(guider).from_pretrained(str(tmp_path))
    assert (loaded._cfg, loaded._term) == (guider._cfg, guider._term)
    same = guider.new()
    assert (same._cfg, same._term) == (guider._cfg, guider._term)
    assert repr(guider)


def test_new_changes_a_setting():
    guider = PAG(2.0, MID, Blur(0.7)).as_guider(cfg=4.0)
    other = guider.new(pag_scale=1.0, guidance_scale=6.0)
    assert other._term == PAG(1.0, MID, Blur(0.7))
    assert other.guidance_scale == 6.0
    assert guider.config["pag_scale"] == 2.0
    assert CFG(3.0).as_guider().new(guidance_interval=[0, 500])._cfg == CFG(3.0, interval=(0, 500))


def test_the_weaker_model_is_not_saved(tmp_path):
    weak = torch.nn.Linear(1, 1)
    guider = AutoGuidance(weak, scale=2.0).as_guider(cfg=4.0)
    guider.save_pretrained(str(tmp_path))
    loaded = AutoGuidanceGuider.from_pretrained(str(tmp_path), weaker_model=weak)
    assert (loaded._cfg, loaded._term) == (guider._cfg, guider._term)
    assert guider.new(auto_scale=1.0)._term == AutoGuidance(weak, scale=1.0)
    with pytest.raises(TypeError, match="needs weaker_model="):
        AutoGuidanceGuider.from_pretrained(str(tmp_path))
    assert AutoGuidance(build("sdxl")).as_guider()._term.weaker_model.config["cross_attention_dim"] == 32


def test_a_noise_level_with_a_timestep_is_one(pipe):
    denoiser = Denoiser.from_pipe(pipe)
    low, high = denoiser.level(NoiseLevel(nsr=0.5)), denoiser.level(900)
    assert CFG(5.0, interval=(low, high)).as_guider()._cfg.interval == (float(low.timestep), 900.0)
    with pytest.raises(ValueError, match="training timesteps"):
        PAG(interval=(NoiseLevel(nsr=0.5), 900)).as_guider()


# Errors


def others():
    yield SAG(0.5)
    yield EnergyGuidance(lambda features, x0, condition: x0.sum())
    for kind in (ClassifierGuidance, ReadoutGuidance, DepthGuidance):
        yield object.__new__(kind)  # what it is made of is not asked


@pytest.mark.parametrize("config", list(others()), ids=lambda config: type(config).__name__)
def test_what_the_interface_cannot_express_raises(config):
    for arguments in ({}, {"cfg": 5.0}):
        with pytest.raises(NotImplementedError, match=f"{type(config).__name__} cannot be a guider.*guide\\(pipe"):
            config.as_guider(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAGGuider(pag_scale=math.nan), "must be finite"),
        (lambda: PAGGuider(pag_interval=(900, 100)), "wrong way round"),
        (lambda: PAGGuider(pag_interval=[1, 2, 3]), "two noise levels"),
        (lambda: PAGGuider(perturbation="shuffle"), "is one of identity"),
        (lambda: PAGGuider(perturbation={"sigma": 1.0}), "has no name"),
        (lambda: CFGGuider(guidance_rescale=2.0), "rescale must be in"),
        (lambda: PAG().as_guider(cfg=math.inf), "must be finite"),
    ],
)
def test_settings_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_are_checked_by_the_network(pipe):
    with pytest.raises(ValueError, match="matches cross-attention only"):
        run(pipe, PAG(layers="mid_block.*.attn2").as_guider(), steps=1)
    with pytest.raises(ValueError, match="matches nothing"):
        run(pipe, PAG(layers="nowhere").as_guider(), steps=1)
    assert untouched(pipe.unet)


def test_without_the_null_condition(pipe):
    made = modular(pipe, CFG(1.0).as_guider())
    made.guider.prepare_inputs({"embeds": (torch.ones(1), None)})
    for embeds in ((torch.ones(1), None), torch.ones(1)):  # the second as SD3's pipeline does
        with pytest.raises(ValueError, match="needs the null condition"):
            CFG(5.0).as_guider().prepare_inputs({"embeds": embeds})


def test_a_compiled_network_is_refused_before_it_runs(pipe):
    pipe.unet.compile(backend="eager")
    with Counter(pipe.unet) as counter, pytest.raises(RuntimeError, match="is compiled"):
        run(pipe, PAG(3.0).as_guider(), steps=1)
    assert counter.calls == 0


def test_a_guided_or_caching_network_is_refused(pipe):
    handle = guide(pipe, PAG(3.0))
    with pytest.raises(ValueError, match="guided by guide"):
        run(pipe, PAG(3.0).as_guider(), steps=1)
    handle.remove()
    pipe.unet.is_cache_enabled = True
    with pytest.raises(ValueError, match="disable_cache"):
        run(pipe, PAG(3.0).as_guider(), steps=1)


def test_predictions_of_other_lanes():
    guider = PAG(3.0).as_guider()
    guider.set_state(0, 4, torch.tensor(999.0))
    made = batches(guider)
    for batch in made:
        batch.noise_pred = torch.ones(1)
    with pytest.raises(ValueError, match="expects predictions"):
        guider(made[:1])


@pytest.mark.parametrize(("interval", "run_told"), [((600, 900), 0), ((0, 0.5), 1)])
def test_an_interval_that_no_step_is_in_warns_once_a_run(pipe, interval, run_told):
    """At the last timestep, 1, if the interval lies behind; else it might have further timesteps."""
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    made = modular(pipe, PAG(3.0, interval=interval).as_guider(), scheduler=scheduler)
    told = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample(made, steps=2)
        told.append([str(w.message) for w in caught if "acted at no step" in str(w.message)])
    assert [len(messages) for messages in told] == ([1, 1] if run_told == 0 else [0, 1])
    assert told[run_told][0].startswith(f"PAG acted at no step of a run: interval={interval}")


def test_a_run_that_was_broken_off_is_not_judged(pipe):
    made = modular(pipe, PAG(3.0, interval=(0, 400)).as_guider())
    handle = pipe.unet.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(made)
    handle.remove()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(made)
    assert not [w for w in caught if "acted at no step" in str(w.message)]


def test_a_scheduler_of_two_calls_a_step_is_not_judged_early(pipe):
    """Its timesteps outnumber `num_inference_steps`, which is all that a guider is told."""
    scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(pipe, PAG(3.0, interval=(0, 300)).as_guider(), scheduler=scheduler)
    assert not [w for w in caught if "acted at no step" in str(w.message)]
    assert not torch.equal(found, run(pipe, PAG(0.0).as_guider(), scheduler=scheduler))


def test_a_network_for_which_the_pipeline_disables_guiders(pipe):
    guider = PAG(3.0).as_guider()
    guider.disable()
    guider.set_state(0, 1, torch.tensor(999.0))
    made = batches(guider)
    assert len(made) == 1
    made[0].noise_pred = torch.ones(1)
    with pytest.warns(UserWarning, match="the pipeline disables guiders"):
        assert torch.equal(guider(made).pred, torch.ones(1))
