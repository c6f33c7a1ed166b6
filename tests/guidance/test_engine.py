"""The engine: off is off, terms are linear, forms of prediction do not matter, costs are those of the methods."""

import contextlib
import inspect
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_repr import CFG, PAG, SAG, guide
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.pag import PAGTerm
from diffusers_repr.noise import NoiseLevel
from tests.capture.models import hook_count
from tests.testers.cases import pairs, some
from tests.testers.guidance import Counter, Recast, noise, sample, toy_denoiser
from tests.testers.hosts import noise_of_float32
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build

NAMES = [name for name in PIPELINES if name != "class_unet"]  # no stock pipeline samples it


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def run(name, pipe, scale=None, steps=2, seed=0, **extra):
    """A pipeline's output; `scale` is that of its own guidance, where it has one."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = {**CONDITIONS[name], "num_inference_steps": steps, "output_type": "np", **extra}
    if "class_labels" in call:
        call["class_labels"] = [call["class_labels"], 3]
    if scale is not None and "flux" in name:
        call.update(true_cfg_scale=scale, negative_prompt="bad")
    elif scale is not None:
        call["guidance_scale"] = scale
    if "use_resolution_binning" in accepted:
        call["use_resolution_binning"] = False
    if name not in ("dit", "ddpm", "ddim"):
        call.update(zip(("height", "width"), SIZES[name], strict=True))
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(seed)).images)


def own_scales(pipe):
    return (1.0, 3.0) if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters else (None,)


# Off


@pytest.mark.parametrize("name", some(NAMES, "ddim", "sd", "dit", "sd3", "flux"))
def test_weight_zero_is_the_stock_pipeline(name):
    pipe = build(name)
    network = network_of(pipe)
    guidance = [PAG(0.0), *([SAG(0.0)] if name in AFFINE["SAG"][1] else [])]
    for scale in own_scales(pipe):
        with Counter(network) as stock:
            expected = run(name, pipe, scale)
        scheduler, methods = pipe.scheduler, vars(pipe.scheduler).keys() | {type(pipe.scheduler)}
        with Counter(network) as counter, guide(pipe, guidance) as handle:
            found = run(name, pipe, scale)
            assert hook_count(network) == 1  # the counter
            assert pipe.scheduler is scheduler
            assert vars(scheduler).keys() | {type(scheduler)} == methods
        assert torch.equal(found, expected)
        assert counter.rows == stock.rows
        assert handle.stats.calls == 0


@pytest.mark.parametrize("name", some(NAMES, "ddim", "sd", "dit", "flux"))
def test_outside_of_the_interval_it_is_the_stock_pipeline_too(name):
    """At steps where nothing acts, the same rows are run and nothing is rounded."""
    pipe = build(name)
    scale = own_scales(pipe)[-1]
    expected, outputs = run(name, pipe, scale), []
    with guide(pipe, PAG(2.0, interval=(250, 260))) as handle:
        network_of(pipe).register_forward_hook(lambda m, a, out: outputs.append(out))
        try:
            found = run(name, pipe, scale)
        finally:
            with pytest.raises(RuntimeError, match=r"PAG did not act in any of \d network calls"):
                handle.remove()
            handle.stats.calls = 1
    assert torch.equal(found, expected)


# Linear in the weight, at one network call

# config(weight) and what its pipelines need: others add their own.
AFFINE = {
    "PAG": (lambda w: PAG(w), ("ddpm", "ddim", "sd", "sdxl", "dit", "pixart", "sd3", "flux", "sana")),
    "PAG drop": (lambda w: PAG(w, perturbation="drop"), ("ddim", "sd", "sd3")),
    "CFG": (lambda w: CFG(1 + w), ("sd", "sdxl", "dit", "pixart", "sd3", "sana")),
    "SAG": (lambda w: SAG(w), ("ddpm", "ddim", "sd", "sdxl", "dit", "pixart")),
}
CASES = [(method, name) for method, (_, names) in AFFINE.items() for name in names]


class Broken(Exception):
    """Leaves a pipeline at its scheduler's step."""


def first_output(name, pipe, guidance, scale):
    """What the network returns in the first call of a run."""
    kept = []

    def keep(module, args, kwargs, output):
        kept.append(output[0][:, : network_of(pipe).config.in_channels].double())  # without a learned variance
        raise Broken

    with contextlib.suppress(Broken), guide(pipe, guidance):
        handle = network_of(pipe).register_forward_hook(keep, with_kwargs=True)
        try:
            run(name, pipe, scale)
        finally:
            handle.remove()
    return kept[0]


FAST = [
    *[("PAG", name) for name in ("ddim", "sd", "pixart", "sd3", "flux")],
    ("PAG drop", "sd3"),
    *[("CFG", name) for name in ("sd", "dit", "sana")],
    *[("SAG", name) for name in ("ddim", "sd", "dit")],
]


@pytest.mark.parametrize(("method", "name"), some(CASES, *FAST))
def test_terms_are_linear_in_the_weight(method, name):
    config = AFFINE[method][0]
    pipe = build(name).to(torch.float64) if name in ("ddpm", "ddim", "sd", "dit", "sd3") else build(name)
    for scale in own_scales(pipe)[-1:]:
        nothing, once, twice = (first_output(name, pipe, config(w), scale) for w in (0.0, 0.75, 1.5))
    change = once - nothing
    assert change.abs().max() > 1e-5
    torch.testing.assert_close(twice - once, change, rtol=0, atol=1e-6 * max(1.0, float(once.abs().max())))


# The form of prediction


def ddim(prediction):
    """With its table in float64: float32 products of alphas would hide what is compared."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return scheduler


FORMS = {
    "ddim": (ddim, ("epsilon", "sample", "v_prediction")),
    "euler": (lambda p: EulerDiscreteScheduler(prediction_type=p), ("epsilon", "sample", "v_prediction")),
    "dpm": (lambda p: DPMSolverMultistepScheduler(prediction_type=p), ("epsilon", "sample", "v_prediction")),
    "dpm flow": (
        lambda p: DPMSolverMultistepScheduler(prediction_type=p, use_flow_sigmas=True, flow_shift=2.0),
        ("epsilon", "sample", "flow_prediction"),
    ),
}
TERMS = {
    "PAG": lambda: PAG(2.0, layers="x0.mid_block.attentions.0"),
    "PAG adaptive": lambda: PAG(2.0, layers="x0.mid_block.attentions.0", adaptive=0.003),
    "SAG": lambda: SAG(0.75, layers="x0.mid_block.attentions.0"),
    "CFG": lambda: CFG(3.0, interval=(100, 900)),
}


def twins(kind, prediction):
    scheduler = FORMS[kind][0](prediction)
    unet = build("class_unet").unet.double()
    return Recast(unet, scheduler), scheduler


@pytest.mark.parametrize(
    ("kind", "method"),
    pairs(
        FORMS,
        TERMS,
        ("ddim", "PAG"),
        ("ddim", "SAG"),
        ("euler", "SAG"),
        ("dpm", "CFG"),
        ("dpm flow", "PAG adaptive"),
    ),
)
def test_forms_of_prediction_give_the_same_samples(kind, method):
    results = []
    x, labels = noise(2, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 2])
    for prediction in FORMS[kind][1]:
        model, scheduler = twins(kind, prediction)
        null = {"class_labels": torch.tensor([0])} if method == "CFG" else None
        with guide(toy_denoiser(model, scheduler), TERMS[method](), scheduler=scheduler, null=null):
            results.append(sample(model, scheduler, x, steps=4, class_labels=labels))
    plain = sample(model, scheduler, x, steps=4, class_labels=labels)
    assert (results[0] - plain).abs().max() > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5 * float(results[0].abs().max()))


def test_flow_matching_against_a_loop_in_velocity():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    unet = build("class_unet").unet
    x, labels = noise(2, 3, 16, 16), torch.tensor([1, 2])
    with guide(Denoiser(unet, scheduler), PAG(2.0), scheduler=scheduler):
        found = sample(unet, scheduler, x, class_labels=labels)
    attention = unet.mid_block.attentions[0]
    with torch.no_grad():
        for now, after in itertools.pairwise(scheduler.sigmas):
            velocity = unet(x, now * 1000, class_labels=labels).sample
            kept, attention.processor = attention.processor, _identity
            perturbed = unet(x, now * 1000, class_labels=labels).sample
            attention.processor = kept
            x = x + (after - now) * (3 * velocity - 2 * perturbed)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def _identity(attention, hidden_states, *args, **kwargs):
    """A map `(B, C, H, W)`: each token keeps its own value."""
    residual, (b, c, h, w) = hidden_states, hidden_states.shape
    tokens = attention.group_norm(hidden_states.view(b, c, h * w)).transpose(1, 2)
    out = attention.to_out[0](attention.to_v(tokens)).transpose(1, 2).reshape(b, c, h, w)
    return (out + residual) / attention.rescale_output_factor


# Costs

COSTS = {  # guidance, the pipeline's own scale, lanes and passes a step, backward passes a step
    "nothing but CFG": ([CFG(3.0)], 3.0, 2, 1, 0),
    "PAG": ([PAG(2.0)], 1.0, 2, 1, 0),
    "PAG with the pipeline's guidance": ([PAG(2.0)], 3.0, 3, 1, 0),
    "CFG and PAG": ([CFG(3.0), PAG(2.0)], 3.0, 3, 1, 0),
    "two PAG": ([PAG(2.0), PAG(1.0, perturbation="drop")], 3.0, 4, 1, 0),
    "SAG": ([SAG(0.75)], 1.0, 2, 2, 0),
    "SAG and CFG": ([SAG(0.75), CFG(3.0)], 3.0, 3, 2, 0),
}


@pytest.mark.parametrize(
    ("method", "name"),
    pairs(
        COSTS,
        ["sd", "dit", "pixart"],
        *[(method, "sd") for method in COSTS],
        ("CFG and PAG", "dit"),
        ("SAG and CFG", "pixart"),
    ),
)
def test_costs(method, name):
    guidance, scale, lanes, passes, backward = COSTS[method]
    pipe = build(name)
    steps, rows = 2, 2 if name == "dit" else 1
    with Counter(last_module(pipe)) as counter, guide(pipe, guidance) as handle:
        run(name, pipe, scale, steps=steps)
    stats = handle.stats
    assert (stats.lanes, stats.passes, stats.backward_passes) == (lanes * steps, passes * steps, backward * steps)
    assert counter.calls == passes * steps
    assert sum(counter.rows) == lanes * steps * rows


def last_module(pipe):
    network = network_of(pipe)
    return next(getattr(network, name) for name in ("conv_out", "proj_out", "proj_out_2") if hasattr(network, name))


# Loops of one's own


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_loop_of_ones_own_equals_the_pipeline(name):
    pipe = build(name)
    with guide(pipe, PAG(2.0)):
        expected = run(name, pipe, steps=3)
    generator = torch.Generator().manual_seed(0)
    channels = pipe.unet.config.in_channels
    x = torch.randn(1, channels, 16, 16, generator=generator)
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad(), guide(Denoiser.from_pipe(pipe), PAG(2.0), scheduler=pipe.scheduler) as handle:
        for t in pipe.scheduler.timesteps:
            out = pipe.unet(x, t).sample
            x = pipe.scheduler.step(out, t, x, generator=generator).prev_sample
    found = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert handle.stats.lanes == 6


def test_a_loop_without_scheduler_has_the_levels_of_the_training_table():
    pipe = build("ddim")
    denoiser = Denoiser.from_pipe(pipe)
    x = noise(2, 3, 16, 16)
    inside, outside = {}, {}
    with torch.no_grad(), guide(denoiser, PAG(2.0, interval=(NoiseLevel(nsr=0.5), NoiseLevel(nsr=4.0)))) as handle:
        for t in (50, 400, 900):
            (inside if t == 400 else outside)[t] = pipe.unet(x, t).sample
    for t, found in outside.items():
        assert torch.equal(found, pipe.unet(x, t).sample)
    assert (inside[400] - pipe.unet(x, 400).sample).abs().max() > 1e-4
    assert [step.acted for step in handle.stats.steps] == [[], ["PAG"], []]


@pytest.mark.parametrize("scheduler", [False, True])
def test_one_noise_level_for_the_whole_batch(scheduler):
    pipe = build("ddim")
    pipe.scheduler.set_timesteps(10)
    stepped = pipe.scheduler if scheduler else None
    with (
        pytest.raises(ValueError, match=r"one noise level for the whole batch; got timesteps \[900, 800\]"),
        guide(Denoiser.from_pipe(pipe), PAG(2.0), scheduler=stepped),
    ):
        pipe.unet(noise(2, 3, 16, 16), torch.tensor([900, 800]))


# Half precision


@pytest.mark.parametrize(
    ("name", "dtype"),
    pairs(
        ["ddim", "sd", "dit", "sd3", "flux"],
        [torch.bfloat16, torch.float16],
        ("ddim", torch.float16),
        ("sd", torch.bfloat16),
        ("flux", torch.float16),
    ),
)
def test_half_precision_is_kept_and_the_sum_is_wider(name, dtype, monkeypatch):
    noise_of_float32(monkeypatch)
    pipe = build(name).to(dtype)
    sums, correction = set(), PAGTerm.correction
    monkeypatch.setattr(PAGTerm, "correction", lambda self, step: sums.add(step.cond.dtype) or correction(self, step))
    scale = own_scales(pipe)[-1]
    config = PAG(2.0)
    plain = first_output(name, pipe, PAG(1e-12), scale)
    seen = []
    network_of(pipe).register_forward_hook(lambda m, a, out: seen.append(out[0].dtype))
    found = first_output(name, pipe, config, scale)
    assert set(seen) == {dtype}
    assert sums == {torch.float32}
    term = found - plain
    exact = first_output(name, build(name).to(dtype).to(torch.float32), config, scale) - first_output(
        name, build(name).to(dtype).to(torch.float32), PAG(1e-12), scale
    )
    assert term.abs().max() > 0
    spacing = torch.finfo(dtype).eps * float(plain.abs().max())
    assert float((term - exact).abs().mean()) < 4 * spacing
