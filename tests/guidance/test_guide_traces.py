"""Guidance leaves nothing behind, however it ends, and lives with offloading, copies and other readers."""

import contextlib
import copy
import gc
import io
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from diffusers_repr import CFG, PAG, SAG, EnergyGuidance, FeatureExtractor, guide, is_guided, unguide
from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from tests.capture.models import hook_count
from tests.capture.test_traces import offload
from tests.guidance.test_engine import NAMES, network_of, own_scales, run
from tests.testers.cases import pairs, some
from tests.testers.guidance import Counter, Recast, noise, sample, toy_denoiser
from tests.testers.models import build


def energy():
    return EnergyGuidance(lambda features, x0, condition: x0.square().mean((1, 2, 3)), scale=10.0)


def snapshot(pipe):
    """All that guidance could leave changed."""
    network = network_of(pipe)
    modules = []
    for name, module in network.named_modules():
        hooks = [dict(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")]
        extra = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        modules.append((name, type(module), module.training, hooks, extra, id(module.__dict__.get("forward"))))
    components = {name: id(component) for name, component in pipe.components.items()}
    flags = [p.requires_grad for p in network.parameters()]
    grads = [p.grad is None for p in network.parameters()]
    scheduler = (type(pipe.scheduler), set(vars(pipe.scheduler)), dict(pipe.scheduler.config))
    config = copy.deepcopy(dict(network.config)), copy.deepcopy(dict(pipe.config))
    return modules, components, flags, grads, scheduler, config, torch.is_grad_enabled()


# The scheduler's own attributes grow in a first run, so one is made before.
def warmed(name):
    pipe = build(name)
    run(name, pipe, own_scales(pipe)[-1], steps=1)
    network = network_of(pipe)
    next(network.parameters()).requires_grad_(False)
    next(network.children()).train()
    return pipe


@pytest.mark.parametrize("name", some(NAMES, "ddim", "sd", "dit", "sd3", "flux"))
def test_nothing_is_left_after_success(name):
    pipe = warmed(name)
    before, processors = snapshot(pipe), _processors(pipe)
    with guide(pipe, [PAG(2.0), energy()]):
        run(name, pipe, own_scales(pipe)[-1])
    assert snapshot(pipe) == before
    assert [id(p) for p in _processors(pipe)] == [id(p) for p in processors]
    handle = guide(pipe, PAG(2.0))
    handle.remove()
    handle.remove()
    assert snapshot(pipe) == before
    assert handle.stats.calls == 0


def _processors(pipe):
    return [module.processor for module in network_of(pipe).modules() if hasattr(module, "processor")]


class Raises:
    """A hook that raises in a forward of a module, the second if nothing is said."""

    def __init__(self, error, at=2):
        self.error, self.calls, self.at = error, 0, at

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


ERRORS = [RuntimeError("in the network"), KeyboardInterrupt()]


GUIDANCES = {"PAG": [PAG(2.0)], "energy": [energy()], "all": [PAG(2.0), SAG(0.75), energy()]}


@pytest.mark.parametrize(
    ("error", "guidance", "form"),
    some(
        itertools.product(ERRORS, GUIDANCES, ["block", "handle"]),
        (ERRORS[0], "all", "block"),
        (ERRORS[0], "PAG", "handle"),
        (ERRORS[1], "energy", "block"),
        (ERRORS[1], "all", "handle"),
    ),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_nothing_is_left_after_an_error_in_the_network(error, guidance, form):
    pipe, guidance = warmed("short_sd"), GUIDANCES[guidance]
    before = snapshot(pipe)
    expected = run("sd", pipe, 3.0)
    with guide(pipe, guidance):
        guided = run("sd", pipe, 3.0)
    last = pipe.unet.up_blocks[-1]

    def fail():
        hook = last.register_forward_hook(Raises(error))
        try:
            run("sd", pipe, 3.0)
        finally:
            hook.remove()

    if form == "block":
        with pytest.raises(type(error)), guide(pipe, guidance):
            fail()
    else:
        handle = guide(pipe, guidance)
        with pytest.raises(type(error)):
            fail()
        assert torch.equal(run("sd", pipe, 3.0), guided)  # and goes on as if nothing had been
        handle.remove()
    assert snapshot(pipe) == before
    assert torch.equal(run("sd", pipe, 3.0), expected)


def test_an_error_in_the_network_is_undone_at_once():
    """In a loop of one's own the guidance stays on; whoever catches the error goes on in no mode of ours."""
    pipe = build("ddim")
    network, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(2)
    x = noise(1, 3, 16, 16)
    with guide(Denoiser.from_pipe(pipe), energy(), scheduler=scheduler), torch.no_grad():
        hook = network.up_blocks[-1].register_forward_hook(Raises(RuntimeError("in the network"), at=1))
        with pytest.raises(RuntimeError):
            network(x, scheduler.timesteps[0])
        hook.remove()
        assert not torch.is_grad_enabled()
        assert all(parameter.requires_grad for parameter in network.parameters())
        prediction = noise(1, 3, 16, 16, seed=1)  # stepped without the network: nothing of its call is left to add
        found = scheduler.step(prediction, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(2)
    assert torch.equal(found, scheduler.step(prediction, scheduler.timesteps[0], x).prev_sample)


def test_a_run_broken_off_before_the_interval_is_not_judged():
    pipe = build("short_sd")
    handle = guide(pipe, PAG(2.0, interval=(0, 300)))

    def stop(*args):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("sd", pipe, 3.0, steps=4, callback_on_step_end=stop)
    handle.remove()
    handle = guide(pipe, PAG(2.0, interval=(400, 450)))
    run("sd", pipe, 3.0, steps=4)
    with pytest.raises(RuntimeError, match="did not act in any of 4 network calls"):
        run("sd", pipe, 3.0, steps=4)
    run("sd", pipe, 3.0, steps=4)
    with pytest.raises(RuntimeError, match="did not act in any of 4 network calls"):
        handle.remove()
    handle.remove()
    assert hook_count(pipe.unet) == 0


@pytest.mark.parametrize("error", [ValueError("in the term"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("own", [1.0, 3.0])
def test_nothing_is_left_after_an_error_in_a_term(error, own):
    pipe = warmed("short_sd")
    before = snapshot(pipe)

    def fails(features, x0, condition):
        raise error

    for guidance in ([EnergyGuidance(fails)], [PAG(1.0), EnergyGuidance(fails, layers=("mid_block",))]):
        with pytest.raises(type(error)), guide(pipe, guidance):
            run("sd", pipe, own)
        assert snapshot(pipe) == before


def test_guide_that_fails_leaves_the_pipeline_untouched():
    pipe = warmed("short_sd")
    before = snapshot(pipe)
    for guidance in ([PAG(2.0), PAG(1.0, layers="nowhere")], [PAG(2.0), CFG(2.0), CFG(3.0)], [PAG(1.0), "PAG"]):
        with pytest.raises((ValueError, TypeError)):
            guide(pipe, guidance)
        assert snapshot(pipe) == before
    with pytest.raises(TypeError, match=r"A scheduler has set_timesteps and step; got object"):
        guide(Denoiser.from_pipe(pipe), PAG(2.0), scheduler=object())
    assert snapshot(pipe) == before
    guide(pipe, PAG(2.0)).remove()  # it does not count as guided


def test_a_users_hooks_and_gradients_stay():
    pipe = build("ddim")
    seen = []
    pipe.unet.register_forward_hook(lambda m, args, out: seen.append(out[0].shape[0]))
    x = noise(2, 3, 16, 16).requires_grad_()
    with guide(Denoiser.from_pipe(pipe), PAG(2.0)):
        out = pipe.unet(x, 300).sample
    out.sum().backward()  # a loop with gradients has them through the guidance
    assert x.grad.abs().sum() > 0
    assert seen == [2]


@pytest.mark.parametrize("name", ["sd", "sd3", "ddim"])
def test_the_global_random_state_is_that_of_an_unguided_run(name):
    pipe = build(name)
    states = []
    for guidance in (None, [PAG(2.0)], [PAG(1.0, perturbation="mask")], [energy()]):
        torch.manual_seed(5)
        with guide(pipe, guidance) if guidance else contextlib.nullcontext():
            run(name, pipe, own_scales(pipe)[-1])
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states[1:])


# Other readers of the network


def test_conditions_and_features_of_a_guided_pipeline():
    pipe = build("short_sd")
    images = [torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1))]
    denoiser = Denoiser.from_pipe(pipe)
    extractor = FeatureExtractor(denoiser, ["mid_block", "up_blocks.1"], 261, image_size="keep")
    condition = denoiser.condition("a cat").inputs["encoder_hidden_states"]
    features = extractor(images)
    expected = run("sd", pipe, 3.0)
    with guide(pipe, [CFG(3.0), PAG(1e-12)]) as handle:
        for _ in range(2):
            assert torch.equal(denoiser.condition("a cat").inputs["encoder_hidden_states"], condition)
            found = extractor(images)
            assert all(torch.equal(found[layer], features[layer]) for layer in extractor.layers)
            torch.testing.assert_close(run("sd", pipe, 2.0), expected, rtol=1e-5, atol=1e-5)
        assert handle.stats.calls == 4


def test_a_reader_during_a_run():
    """In a callback: conditions, features, and the network itself at the sampler's next step."""
    pipe = build("short_sd")
    denoiser = Denoiser.from_pipe(pipe)

    def read(pipeline, step, timestep, tensors):
        denoiser.condition("a dog")
        with capture(pipe.unet, "mid_block"):
            pipe.unet(tensors["latents"], 77, encoder_hidden_states=torch.zeros(1, 5, 16))
        return tensors

    with guide(pipe, [CFG(3.0), PAG(2.0)]):
        expected = run("sd", pipe, 2.0, steps=4)
        found = run("sd", pipe, 2.0, steps=4, callback_on_step_end=read)
    assert torch.equal(found, expected)


def test_a_call_that_is_no_step_of_the_sampler_is_refused():
    pipe = build("short_sd")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def read(pipeline, step, timestep, tensors):
        pipe.unet(tensors["latents"], 77, encoder_hidden_states=torch.zeros(1, 5, 16))
        return tensors

    with (
        pytest.raises(ValueError, match=r"called at timestep 77, but the EulerDiscreteScheduler stands at"),
        guide(pipe, PAG(2.0)),
    ):
        run("sd", pipe, 1.0, steps=4, callback_on_step_end=read)


def test_a_term_may_call_the_network_itself():
    pipe = build("ddim")
    denoiser = Denoiser.from_pipe(pipe)
    calls = []

    def compared(features, x0, condition):
        calls.append(1)
        with torch.no_grad():
            other = denoiser.predict(x0.detach(), 300).x0
        return (x0 - other).square().mean((1, 2, 3))

    with Counter(pipe.unet.conv_in) as counter, guide(pipe, EnergyGuidance(compared, scale=5.0)) as handle:
        run("ddim", pipe)
    assert len(calls) == 2
    assert counter.calls == 4
    assert handle.stats.passes == 2


def test_a_copy_of_a_guided_pipeline_is_not_guided():
    pipe = build("short_sd")
    plain = run("sd", pipe, 3.0)
    with guide(pipe, PAG(5.0)) as handle:
        twin = copy.deepcopy(pipe)
        assert torch.equal(run("sd", twin, 3.0), plain)
        assert not handle.stats.calls
        guided = run("sd", pipe, 3.0)
    assert (guided - plain).abs().max() > 1e-4
    assert torch.equal(run("sd", twin, 3.0), plain)


def copies(pipe, folder):
    """The network of a guided pipeline, had in every way that gives a second one."""
    buffer = io.BytesIO()
    torch.save(pipe.unet, buffer)
    buffer.seek(0)
    pipe.save_pretrained(folder)
    return {
        "deepcopy": copy.deepcopy(pipe.unet),
        "copy": copy.copy(pipe.unet),
        "pickle": pickle.loads(pickle.dumps(pipe.unet)),
        "torch.save": torch.load(buffer, weights_only=False),
        "save_pretrained": type(pipe).from_pretrained(folder).unet,
    }


def test_copies_pickles_and_saved_folders_of_a_guided_network_are_plain(tmp_path):
    pipe = build("ddim")
    plain, state = run("ddim", pipe), pipe.unet.state_dict()
    with guide(pipe, [PAG(5.0), energy()]) as handle:
        guided = run("ddim", pipe)
        twins = copies(pipe, tmp_path)
        for twin in twins.values():
            assert is_guided(pipe.unet)
            assert not is_guided(twin)
            other = type(pipe)(twin, DDIMScheduler.from_config(pipe.scheduler.config))
            other.set_progress_bar_config(disable=True)
            assert torch.equal(run("ddim", other), plain)
        assert len(handle.stats.steps) == 2
        assert torch.equal(run("ddim", pipe), guided)
    assert not torch.equal(guided, plain)
    assert all(torch.equal(twin.state_dict()[key], value) for twin in twins.values() for key, value in state.items())
    again = guide(type(pipe)(twins["pickle"], pipe.scheduler), [PAG(5.0), energy()])  # hooks that it has are idle
    again.remove()


def test_who_is_guided_and_an_end_without_the_handle():
    pipe = build("ddim")
    denoiser, twin = Denoiser.from_pipe(pipe), build("ddim")
    plain = run("ddim", pipe)
    for target in (pipe, denoiser, pipe.unet):
        assert not is_guided(target)
        with pytest.raises(ValueError, match=r"UNet2DModel is not guided; is_guided\(...\) tells"):
            unguide(target)
        guide(pipe if target is pipe else denoiser, PAG(2.0))
        gc.collect()  # nobody holds the handle
        assert is_guided(target)
        assert not is_guided(twin)
        assert not torch.equal(run("ddim", pipe), plain)
        unguide(target)
        assert hook_count(pipe.unet) == 0
    for wrong in (None, "pipe", PAG(1.0)):
        with pytest.raises(TypeError, match="takes a diffusers pipeline or a Denoiser"):
            is_guided(wrong)
    guide(pipe, PAG(0.0))  # off: nothing is set
    assert not is_guided(pipe)


def test_a_lost_guidance_does_not_keep_its_network_alive():
    pipe = build("ddim")
    network = weakref.ref(pipe.unet)
    guide(pipe, PAG(2.0))
    del pipe
    gc.collect()
    assert network() is None


def test_a_network_called_by_position_and_returning_tuples():
    pipe = build("ddim")
    x = noise(2, 3, 16, 16)
    with guide(Denoiser.from_pipe(pipe), PAG(2.0)):
        by_name = pipe.unet(sample=x, timestep=300).sample
        (by_place,) = pipe.unet(x, 300, None, False)
    assert torch.equal(by_name, by_place)


# Offloading


def offload_and_run(name, pipe, kind, guidance, scale):
    offload(pipe, kind)
    with guide(pipe, guidance):
        first = run(name, pipe, scale)
    plain = run(name, pipe, scale)
    with guide(pipe, guidance):
        second = run(name, pipe, scale)
    return first, plain, second


@pytest.mark.parametrize(
    ("name", "kind"),
    pairs(
        ["sd", "flux", "pixart"],
        ["model", "sequential", "block_level", "leaf_level"],
        ("sd", "model"),
        ("sd", "leaf_level"),
        ("flux", "sequential"),
        ("pixart", "block_level"),
    ),
)
def test_offloaded_networks(name, kind):
    pipe = build(name)
    scale = own_scales(pipe)[-1]
    guidance = [
        PAG(2.0),
        *([energy()] if kind in ("model", "sequential") else []),
        *([CFG(3.0, interval=(0, 600))] if name != "flux" else []),
    ]
    plain = run(name, pipe, scale)
    with guide(pipe, guidance):
        expected = run(name, pipe, scale)
    for found, wanted in zip(
        offload_and_run(name, pipe, kind, guidance, scale), (expected, plain, expected), strict=True
    ):
        assert torch.equal(found, wanted)
    if kind == "sequential":
        assert all(p.is_meta for p in network_of(pipe).parameters())


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_offload_works_after_an_error(error):
    pipe = build("short_sd")
    expected = run("sd", pipe, 3.0)
    offload(pipe, "model")
    hook = pipe.unet.up_blocks[-1].register_forward_hook(Raises(error))
    with pytest.raises(type(error)), guide(pipe, [PAG(2.0), energy()]):
        run("sd", pipe, 3.0)
    hook.remove()
    assert hook_count(pipe.unet) == 0
    assert torch.equal(run("sd", pipe, 3.0), expected)


# Effects


class OneToken(nn.Module):
    """A network whose self-attention has one token, which attends to itself whatever is done to it."""

    def __init__(self):
        super().__init__()
        self.unet = build("class_unet").unet

    def forward(self, sample, timestep):
        return self.unet(sample, timestep, class_labels=torch.zeros(len(sample), dtype=torch.long)).sample


def test_a_guidance_without_effect_warns_once():
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    model = Recast(OneToken(), scheduler)
    x = noise(1, 3, 4, 4)  # 1 x 1 in the middle block
    layers = "x0.unet.mid_block.attentions.0"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        handle = guide(toy_denoiser(model, scheduler), PAG(3.0, layers=layers), scheduler=scheduler)
        for _ in range(3):
            sample(model, scheduler, x)
        handle.remove()
    ours = [str(w.message) for w in seen if "changed nothing in a whole run" in str(w.message)]
    assert ours == ["PAG changed nothing in a whole run: its correction was zero."]
