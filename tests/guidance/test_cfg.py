"""CFG: exact on a mixture of Gaussians, in place of the pipeline's own, within an interval."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffusers_repr import CFG, PAG, guide
from diffusers_repr.denoiser import Condition
from diffusers_repr.noise import NoiseSchedule, sampler_level
from tests.testers.cases import some
from tests.testers.guidance import Counter, Mixture, noise, sample, toy_denoiser, toy_means
from tests.testers.models import CONDITIONS, build

SCHEDULERS = {
    "ddim": lambda **kw: DDIMScheduler(clip_sample=False, **kw),
    "euler": EulerDiscreteScheduler,
    "dpm": lambda **kw: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **kw),
}


def mixture(scheduler):
    schedule = NoiseSchedule.from_scheduler(scheduler)
    return Mixture(schedule, toy_means(), weights=[0.3, 0.7])


def labels(value, rows=2):
    return torch.full((rows,), value)


# Exact


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_exact_on_a_mixture(kind, prediction):
    scheduler = SCHEDULERS[kind](prediction_type=prediction)
    model = mixture(scheduler)
    x = noise(2, 3, 4, 4)
    with guide(toy_denoiser(model, scheduler), CFG(3.0), scheduler=scheduler, null={"labels": labels(2)}) as handle:
        found = sample(model, scheduler, x, steps=5, labels=labels(0))

    # the guided field in closed form, written in float64 at the sampler's own alpha and sigma
    plain = SCHEDULERS[kind](prediction_type="epsilon")
    schedule = NoiseSchedule.from_scheduler(plain)

    def guided(sample, timestep, **_):
        level = sampler_level(plain, timestep, schedule).level
        cond, null = (model.exact(sample.double(), level.alpha, level.sigma, labels(k)) for k in (0, 2))
        return (null + 3 * (cond - null)).float()

    expected = sample(guided, plain, x, steps=5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert handle.stats.lanes == 2 * len(handle.stats.steps) == 10
    unguided = sample(model, scheduler, x, steps=5, labels=labels(0))
    assert (unguided - found).abs().max() > 0.1


def test_scale_one_is_the_condition_and_zero_the_null():
    scheduler = SCHEDULERS["ddim"]()
    model, denoiser = mixture(scheduler), None
    denoiser = toy_denoiser(model, scheduler)
    x, null = noise(2, 3, 4, 4), {"labels": labels(2)}
    call = {"sample": x, "timestep": torch.tensor([400, 400]), "labels": labels(0)}
    for scale, label in ((1.0, 0), (0.0, 2)):
        with guide(denoiser, CFG(scale), null=null):
            found = model(**call)
        torch.testing.assert_close(found, model(x, 400, labels(label)))


def test_null_condition_of_one_row_and_as_an_object():
    scheduler = SCHEDULERS["ddim"]()
    model = mixture(scheduler)
    denoiser = toy_denoiser(model, scheduler)
    call = {"sample": noise(3, 3, 4, 4), "timestep": torch.tensor(400), "labels": labels(0, 3)}
    one = Condition({"labels": labels(2, 1)}, 1, torch.zeros(1, dtype=torch.long))
    results = []
    for null in ({"labels": labels(2, 3)}, {"labels": labels(2, 1)}, one):
        with guide(denoiser, CFG(2.0), null=null):
            results.append(model(**call))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with (
        pytest.raises(ValueError, match="null condition has 2 rows; the call has 3"),
        guide(denoiser, CFG(2.0), null={"labels": labels(2, 2)}),
    ):
        model(**call)


# In place of the pipeline's own

GUIDED = ["sd", "sdxl", "sd3", "dit", "pixart", "sana", "flux", "flux_guidance"]


def run(name, pipe, scale, seed=0, **extra):
    call = {**CONDITIONS[name], **extra}
    if "class_labels" in call:
        call["class_labels"] = [call["class_labels"], 3]
    if "flux" in name:
        call.update(true_cfg_scale=scale, negative_prompt=extra.get("negative_prompt", "bad"))
    else:
        call["guidance_scale"] = scale
    if name in ("pixart", "sana"):
        call["use_resolution_binning"] = False
    if name != "dit":
        call.update(height=32, width=64 if name == "sana" else 48)
    call.setdefault("num_inference_steps", 3)
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="np").images)


@pytest.mark.parametrize("name", GUIDED)
def test_replaces_the_pipelines_own(name):
    pipe = build(name)
    expected = run(name, pipe, 4.0)
    with guide(pipe, CFG(4.0)) as handle:
        found = run(name, pipe, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert (run(name, pipe, 1.5) - expected).abs().max() > 1e-5
    assert handle.stats.lanes == 6
    assert handle.stats.passes == (6 if "flux" in name else 3)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana", "flux"])
def test_several_prompts_and_images_of_each(name):
    pipe = build(name)
    extra = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
    if name == "flux":
        extra["negative_prompt"] = ["bad", "worse"]
    expected = run(name, pipe, 4.0, **extra)
    with guide(pipe, CFG(4.0)) as handle:
        found = run(name, pipe, 1.5, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    assert len(found) == 4
    assert handle.stats.lanes == 6


@pytest.mark.parametrize("name", GUIDED)
def test_scale_one_is_the_pipeline_without_guidance(name):
    pipe = build(name)
    expected = run(name, pipe, 1.0)
    with guide(pipe, CFG(1.0)) as handle:
        found = run(name, pipe, 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    if "flux" not in name:  # which calls its network a second time all the same
        assert handle.stats.lanes == 3


@pytest.mark.parametrize("name", GUIDED)
def test_without_null_condition_it_raises(name):
    pipe = build(name)
    with pytest.raises(ValueError, match=r"the null condition.*(guidance|cfg)_scale > 1"), guide(pipe, CFG(4.0)):
        run(name, pipe, 1.0)
    run(name, pipe, 1.0)
    denoiser = toy_denoiser(mixture(SCHEDULERS["ddim"]()), SCHEDULERS["ddim"]())
    with pytest.raises(ValueError, match=r"null=condition"), guide(denoiser, CFG(4.0)):
        denoiser.model(sample=noise(2, 3, 4, 4), timestep=torch.tensor(5), labels=labels(0))


# Interval


class Probe:
    """The network's inputs of every call, and what the scheduler's step is given."""

    def __init__(self, pipe):
        self.timesteps = []
        step = pipe.scheduler.step

        def spy(model_output, timestep, *args, **kwargs):
            self.timesteps.append(float(timestep))
            return step(model_output, timestep, *args, **kwargs)

        pipe.scheduler.step = spy


@pytest.mark.parametrize(
    "name", some(["sd", "sdxl", "sd3", "dit", "pixart", "sana", "flux"], "sd", "sd3", "dit", "pixart", "flux")
)
def test_interval_runs_the_conditional_lane_only_outside(name):
    """Equal to the pipeline called with the scale of each step, which diffusers lets a callback change."""
    pipe = build(name)
    low, high = 300, 800
    first = {"sd": "conv_in", "sdxl": "conv_in", "dit": "pos_embed", "pixart": "pos_embed", "sd3": "pos_embed"}
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    part = network.get_submodule(first.get(name, "x_embedder" if name == "flux" else "patch_embed"))
    steps = 5
    with Counter(part) as counter, guide(pipe, CFG(4.0, interval=(low, high))) as handle:
        found = run(name, pipe, 1.5, num_inference_steps=steps)
    times = [float(step.level.timestep) for step in handle.stats.steps]
    inside = [low <= t <= high for t in times]
    assert 0 < sum(inside) < len(inside)
    batch = 2 if name == "dit" else 1
    if name == "flux":
        assert counter.rows == [1] * 2 * steps
    else:
        assert counter.rows == [2 * batch if on else batch for on in inside]
        assert handle.stats.lanes == sum(2 if on else 1 for on in inside)
        assert [step.lanes for step in handle.stats.steps] == [2 if on else 1 for on in inside]

    expected = _piecewise(name, pipe, low, high, steps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - run(name, pipe, 4.0, num_inference_steps=steps)).abs().max() > 1e-5


def _piecewise(name, pipe, low, high, steps):
    """The pipeline's own guidance with scale 1 + 3 inside and 1 outside, by rewriting the network's null rows."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    pending = []

    def rewrite(module, args, kwargs, output):
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        t = float(torch.as_tensor(timestep).flatten()[0]) * {"flux": 1000, "sana": 2}.get(name, 1)
        tensor = output[0]
        if not low - 1e-2 <= t <= high + 1e-2:  # null := cond
            if name == "flux":
                pending.append(tensor)
                if len(pending) % 2 == 0:
                    tensor = pending[-2]
            else:
                one, two = tensor.chunk(2)
                cond = one if name == "dit" else two
                tensor = torch.cat([cond, cond])
        return (tensor,) if isinstance(output, tuple) else type(output)(sample=tensor)

    hook = network.register_forward_hook(rewrite, with_kwargs=True)
    try:
        return run(name, pipe, 4.0, num_inference_steps=steps)
    finally:
        hook.remove()


# Rescale


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_rescale_is_that_of_the_pipeline(name):
    pipe = build(name)
    expected = run(name, pipe, 9.0, guidance_rescale=0.7)
    with guide(pipe, CFG(9.0, rescale=0.7)):
        found = run(name, pipe, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (run(name, pipe, 9.0) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [PAG(1.0), CFG(4.0)], ids=["pag", "cfg"])
def test_a_pipeline_that_rescales_what_is_added_is_refused(guidance):
    pipe = build("sd")
    with pytest.raises(ValueError, match=r"guidance_rescale=0.7 .* CFG\(scale, rescale=0.7\)"), guide(pipe, guidance):
        run("sd", pipe, 4.0, guidance_rescale=0.7)
    with guide(pipe, PAG(1.0)):  # it does not rescale without its own guidance
        run("sd", pipe, 1.0, guidance_rescale=0.7)


def test_rescale_out_of_range():
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\]; got 1.5"):
        CFG(2.0, rescale=1.5)


# Pipelines that call the network once more


@pytest.mark.parametrize("guidance", [[CFG(4.0)], [PAG(2.0)], [CFG(4.0), PAG(2.0)]], ids=["cfg", "pag", "both"])
def test_skipped_layers_of_sd3_differ_from_the_condition_as_ever(guidance):
    """What SD3 adds, cond - skipped, is that of the unguided outputs, whatever was added to them."""
    pipe = build("sd3")
    calls = []

    def keep(module, args, kwargs, output):
        calls.append((kwargs, output[0]))

    with guide(pipe, guidance):
        hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        run("sd3", pipe, 4.0, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.9)
        hook.remove()
    assert [len(kwargs["hidden_states"]) for kwargs, _ in calls] == [2, 2, 1, 2, 1]
    for at in (1, 3):
        (kwargs, both), (skipping, skipped) = calls[at], calls[at + 1]
        assert "skip_layers" in skipping
        with torch.no_grad():
            raw = pipe.transformer(**kwargs)[0][1:] - pipe.transformer(**skipping)[0]
        torch.testing.assert_close(both[1:] - skipped, raw, rtol=1e-4, atol=1e-5)
        assert raw.abs().max() > 1e-3
