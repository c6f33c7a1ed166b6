"""EnergyGuidance against loops written out by hand; what it costs, refuses and leaves behind."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import nn

from diffusers_repr import PAG, Denoiser, EnergyGuidance, GenericFamily, guide
from diffusers_repr.guidance.sag import SAG
from tests.guidance.energy_loops import STEPS, energy, sample, setup
from tests.testers.cases import pairs, some
from tests.testers.models import build, unet2d

UP = "up_blocks.1.resnets.1.conv2"  # of Stable Diffusion: half of the latents' size
# Family -> layer, its grid, index of the image in what it returns, width of the images.
PLACES = {
    "sd": (UP, None, None),
    "sd3": ("transformer_blocks.0", (8, 12), 1),
    "dit": ("transformer_blocks.1", (8, 8), None),
    "flux": ("transformer_blocks.1", (8, 12), 1),
}
RATES = {"eps": 3.0, "latent_sign": 0.05, "latent_adam": 0.05}


def layer_energy(layer):
    def fn(features, x0, condition):
        assert x0 is None
        return energy(features[layer])

    return EnergyGuidance(fn, layers=[layer])


def call(pipe, name, scale, count=1, **kwargs):
    arguments = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    if name == "dit":
        arguments |= {"class_labels": [207] * count, "output_type": "np"}
    else:
        arguments |= {"prompt": "a cat", "height": 32, "width": 48, "num_images_per_prompt": count}
    if name != "flux":
        arguments["guidance_scale"] = scale
    return pipe(**arguments, **kwargs).images


def decoded(pipe, latents):
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


CASES = [
    ("sd", "ddim", 1.0),
    *[("sd", sampler, 4.0) for sampler in ("ddim", "euler", "dpm")],
    ("sd3", None, 1.0),
    ("sd3", None, 4.0),
    ("dit", None, 1.0),
    ("dit", None, 4.0),
    ("flux", None, 1.0),
]


@pytest.mark.parametrize(
    ("name", "sampler", "scale", "update"),
    some(
        [(*case, update) for case in CASES for update in RATES],
        ("sd", "dpm", 4.0, "eps"),
        ("sd3", None, 4.0, "eps"),
        ("dit", None, 4.0, "eps"),
        ("flux", None, 1.0, "eps"),
        ("sd", "euler", 4.0, "latent_sign"),
        ("flux", None, 1.0, "latent_sign"),
        ("sd", "ddim", 1.0, "latent_adam"),
        ("dit", None, 1.0, "latent_adam"),
    ),
)
def test_equals_a_loop_written_by_hand(name, sampler, scale, update):
    pipe = build(name)
    if sampler == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif sampler == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    layer, grid, index = PLACES[name]
    run = setup(pipe, name, scale, count=2)
    expected = sample(run, layer, grid, update, RATES[update], scale, index)
    config = layer_energy(layer).replace(update=update, scale=RATES[update])
    with guide(pipe, config) as handle:
        found = call(pipe, name, scale, count=2)
    plain = call(pipe, name, scale, count=2)
    if name == "dit":
        expected = decoded(pipe, expected).detach()
        found, plain = torch.from_numpy(found), torch.from_numpy(plain)
    moved = float((found - plain).abs().max())
    assert moved > 1e-3
    # Where the gradient is nearly 0 its sign, and with it a whole step, hangs on rounding.
    off = (found - expected).abs() > 1e-4 * max(1.0, moved)
    assert float(off.float().mean()) <= (0.0 if update == "eps" else 0.005)
    lanes = 1 + (scale > 1)
    skipped = update == "eps" and name in ("sd3", "flux")  # the first step has no signal
    step = handle.stats.steps[-1]
    if update == "eps":
        assert (step.lanes, step.passes, step.backward_passes) == (lanes, lanes, 1)
    else:
        assert (step.lanes, step.passes, step.backward_passes) == (1 + lanes, 2, 1)
    assert handle.stats.backward_passes == STEPS - skipped


def test_the_first_step_of_a_flow_model_has_no_signal_and_is_not_guided():
    pipe = build("sd3")
    steps = []
    with guide(pipe, layer_energy("transformer_blocks.0").replace(scale=5.0)) as handle:
        call(pipe, "sd3", 1.0, callback_on_step_end=lambda p, i, t, k: steps.append(k["latents"]) or {})
    plain = []
    call(pipe, "sd3", 1.0, callback_on_step_end=lambda p, i, t, k: plain.append(k["latents"]) or {})
    assert [step.backward_passes for step in handle.stats.steps] == [0, 1, 1]
    assert handle.stats.steps[0].level.alpha == 0
    assert torch.equal(steps[0], plain[0])
    assert not torch.equal(steps[1], plain[1])
    assert steps[-1].isfinite().all()


def bare(dtype=torch.float64, seed=0, **changes):
    """A small U-Net without condition, to be called by hand."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = unet2d(2, **changes).to(dtype).eval()
    return Denoiser(unet, DDIMScheduler(clip_sample=False))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X = normal(2, 2, 16, 16)


def change(denoiser, configs, t=300, x=X, **condition):
    """Of the network's output, at one call."""
    with torch.no_grad():
        plain = denoiser.model(x, t, **condition).sample
        with guide(denoiser, configs) as handle:
            return denoiser.model(x, t, **condition).sample - plain, handle


def to_target(features, x0, condition):
    return (x0 - 0.3).square().sum((1, 2, 3))


def of_layers(features, x0, condition):
    return sum(energy(feature) for feature in features.values())


LAYERS = ["mid_block.attentions.0", "up_blocks.1.resnets.0"]
ENERGIES = {
    "x0": EnergyGuidance(to_target, scale=2.0),
    "layers": EnergyGuidance(of_layers, layers=LAYERS, scale=2.0),
    "both": EnergyGuidance(lambda f, x0, c: of_layers(f, x0, c) + to_target(f, x0, c), LAYERS, x0=True, scale=2.0),
    "input": EnergyGuidance(lambda f, x0, c: energy(c["sample"]), x0=False, scale=2.0),
}


@pytest.mark.parametrize("kind", list(ENERGIES))
def test_equals_central_differences(kind):
    """eps changes by scale sigma times the gradient of the energy at x_t, of the whole path from x_t."""
    denoiser, config = bare(), ENERGIES[kind]
    found, _ = change(denoiser, config)
    level = denoiser.level(300)
    alpha, sigma = float(level.alpha), float(level.sigma)

    def value(x):
        kept = {}
        handles = [
            denoiser.model.get_submodule(path).register_forward_hook(
                lambda m, a, out, path=path: kept.update({path: out})
            )
            for path in config.layers
        ]
        eps = denoiser.model(x, 300).sample
        for handle in handles:
            handle.remove()
        return float(config.fn(kept, (x - sigma * eps) / alpha, {"sample": x}).sum())

    step = 1e-5
    with torch.no_grad():
        for seed in range(5):
            d = normal(*X.shape, seed=20 + seed)
            measured = (value(X + step * d) - value(X - step * d)) / (2 * step)
            assert float((found * d).sum()) == pytest.approx(2.0 * sigma * measured, rel=1e-6)


@pytest.mark.parametrize("kind", ["x0", "layers", "both", "input"])
def test_together_they_are_the_sum_of_the_parts(kind):
    """Alone the gradient is taken in the call's own pass, beside PAG in one before it."""
    denoiser = bare()
    parts = [ENERGIES[kind], EnergyGuidance(of_layers, LAYERS[:1], scale=-0.5), PAG(2.0), SAG(0.7, kernel_size=3)]
    total, handle = change(denoiser, parts)
    singles = [change(denoiser, part)[0] for part in parts]
    torch.testing.assert_close(total, sum(singles), rtol=1e-9, atol=1e-9)
    assert all(float(single.abs().max()) > 1e-3 for single in singles)
    assert handle.stats.steps[0].backward_passes == 1


def test_is_linear_in_the_scale_and_bit_equal_at_zero():
    denoiser = bare()
    one, _ = change(denoiser, ENERGIES["both"])
    three, _ = change(denoiser, ENERGIES["both"].replace(scale=6.0))
    torch.testing.assert_close(three, 3 * one, rtol=1e-10, atol=1e-10)
    with torch.no_grad(), guide(denoiser, [config.replace(scale=0.0) for config in ENERGIES.values()]):
        assert torch.equal(denoiser.model(X, 300).sample, bare().model(X, 300).sample)


@pytest.mark.parametrize("kind", list(ENERGIES))
@pytest.mark.parametrize("beside", [False, True])
def test_checkpointing_changes_nothing(kind, beside):
    denoiser, config = bare(), ENERGIES[kind]
    if kind == "input":
        with pytest.raises(ValueError, match="does not run the network; leave checkpoint=False"):
            guide(denoiser, config.replace(checkpoint=True))
        return
    others = [PAG(1.0)] if beside else []
    expected, _ = change(denoiser, [config, *others])
    found, _ = change(denoiser, [config.replace(checkpoint=True), *others])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not denoiser.model.is_gradient_checkpointing


def test_its_own_pass_stops_after_the_last_layer():
    denoiser = bare()
    called = []
    for path in ("mid_block", "up_blocks.0", "up_blocks.2", "conv_out"):
        denoiser.model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: called.append(path))
    with torch.no_grad(), guide(denoiser, [EnergyGuidance(of_layers, LAYERS[:1]), PAG(1.0)]) as handle:
        denoiser.model(X, 300)
    assert called.count("up_blocks.0") == called.count("conv_out") == 1
    step = handle.stats.steps[0]
    assert (step.lanes, step.passes, step.backward_passes) == (3, 2, 1)


@pytest.mark.parametrize("update", ["eps", "latent_sign"])
def test_a_small_step_lowers_the_energy(update):
    """At the sample that the next step starts from, against the unguided one."""
    denoiser = bare()
    scheduler = denoiser.scheduler
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[25]
    after = int(scheduler.timesteps[26])
    config = ENERGIES["x0"].replace(update=update, scale=1e-3)

    def end(configs):
        with torch.no_grad(), guide(denoiser, configs, scheduler=scheduler) if configs else nullcontext():
            return scheduler.step(denoiser.model(X, t).sample, t, X).prev_sample

    def value(x):
        with torch.no_grad():
            return to_target({}, denoiser.predict(x, after, {}).x0, {})

    assert (value(end([config])) < value(end([]))).all()
    assert (value(end([config.replace(scale=-1e-3)])) > value(end([]))).all()


def test_the_function_sees_maps_the_estimate_and_the_inputs_of_the_conditional_rows():
    pipe, seen = build("sd"), []

    def fn(features, x0, condition):
        seen.append((features, x0, condition))
        return x0.sum() + features[UP].sum()

    layers = [UP, "up_blocks.1.attentions.0.transformer_blocks.0"]
    with guide(pipe, EnergyGuidance(fn, layers, x0=True, scale=0.1)):
        pipe(["a cat", "a dog"], height=32, width=48, num_inference_steps=2, guidance_scale=4.0, output_type="latent")
    cond, null = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    assert len(seen) == 2
    for features, x0, condition in seen:
        assert {path: tuple(f.shape) for path, f in features.items()} == {
            layers[0]: (2, 16, 4, 6),
            layers[1]: (2, 16, 4, 6),
        }
        assert x0.shape == (2, 4, 16, 24)
        assert torch.equal(condition["encoder_hidden_states"], cond)
        assert condition["sample"].shape == x0.shape
        assert condition["sample"].requires_grad
        assert "timestep" in condition


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", ["eps", "latent_adam"])
def test_networks_in_half_precision(dtype, update):
    """As in float32, as far as the network's own rounding goes; a mean over all entries does not underflow."""
    config = EnergyGuidance(lambda f, x0, c: 1e-4 * of_layers(f, x0, c), LAYERS, scale=1e4, update=update)
    if update != "eps":
        config = config.replace(scale=0.05)

    def moved(dtype):
        denoiser = bare(dtype)
        scheduler, x = denoiser.scheduler, X.to(dtype)
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[5]
        with torch.no_grad():
            plain = scheduler.step(denoiser.model(x, t).sample, t, x).prev_sample
            with guide(denoiser, config, scheduler=scheduler):
                output = denoiser.model(x, t).sample
                assert output.dtype == dtype
                return (scheduler.step(output, t, x).prev_sample - plain).float()

    exact, found = moved(torch.float32), moved(dtype)
    cosine = nn.functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0)
    assert float(cosine) > 0.98


def test_inputs_made_in_inference_mode_serve():
    """Autograd cannot keep them for a backward pass, where the network multiplies by them."""

    class Gated(nn.Module):
        def forward(self, sample, timestep, gate):
            return (sample * sample * gate[0]["by"],)

    def guided(gate):
        denoiser = Denoiser(Gated(), DDIMScheduler(), family=GenericFamily(channels=2))
        with torch.no_grad(), guide(denoiser, ENERGIES["x0"]):
            return denoiser.model(X, 300, [{"by": gate}])[0]

    with torch.inference_mode():
        gate = normal(2, 2, 16, 16, seed=1)
    assert gate.is_inference()
    assert torch.equal(guided(gate), guided(gate.clone()))


def test_offloaded_weights_are_back_after_the_early_stop():
    expected, _ = change(bare(), [EnergyGuidance(of_layers, LAYERS[:1]), PAG(1.0)])
    denoiser = bare()
    cpu_offload(denoiser.model, execution_device=torch.device("cpu"))
    found, _ = change(denoiser, [EnergyGuidance(of_layers, LAYERS[:1]), PAG(1.0)])
    torch.testing.assert_close(found, expected)
    assert {parameter.device.type for parameter in denoiser.model.parameters()} == {"meta"}
    assert all(parameter.requires_grad for parameter in denoiser.model.parameters())
    broken = EnergyGuidance(lambda f, x0, c: 1 / 0, LAYERS[:1])
    with pytest.raises(ZeroDivisionError), torch.no_grad(), guide(denoiser, [broken, PAG(1.0)]):
        denoiser.model(X, 300)
    assert {parameter.device.type for parameter in denoiser.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("update", "error"),
    pairs(
        RATES,
        [ZeroDivisionError, KeyboardInterrupt],
        ("eps", KeyboardInterrupt),
        ("latent_sign", ZeroDivisionError),
        ("latent_adam", KeyboardInterrupt),
    ),
)
def test_an_error_in_the_energy_leaves_nothing(update, error):
    pipe = build("sd")
    pipe.unet.conv_in.weight.requires_grad_(False)
    pipe.unet.conv_out.weight.grad = kept = torch.ones_like(pipe.unet.conv_out.weight)
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    before = call(pipe, "sd", 4.0)

    def fn(features, x0, condition):
        raise error

    with pytest.raises(error), guide(pipe, EnergyGuidance(fn, layers=UP, update=update, checkpoint=True)):
        call(pipe, "sd", 4.0)
    assert torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert pipe.unet.conv_out.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert not pipe.unet.is_gradient_checkpointing
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.equal(call(pipe, "sd", 4.0), before)


def test_a_module_as_the_energy_is_frozen_and_in_eval_mode_meanwhile():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.drop = nn.Conv2d(2, 1, 1).double(), nn.Dropout(0.5)

        def forward(self, features, x0, condition):
            assert not self.drop.training
            assert not self.read.weight.requires_grad
            return self.drop(self.read(x0)).square().mean()

    reader = Reader()
    change(bare(), EnergyGuidance(reader))
    assert reader.training
    assert reader.drop.training
    assert reader.read.weight.requires_grad
    assert reader.read.weight.grad is None


def test_an_energy_without_any_gradient_warns_once():
    pipe = build("sd")
    handle = guide(pipe, EnergyGuidance(lambda f, x0, c: 0 * x0.sum()))
    call(pipe, "sd", 1.0)
    with pytest.warns(UserWarning, match="EnergyGuidance changed nothing in a whole run"):
        call(pipe, "sd", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle.remove()


BAD = {
    "no graph": (lambda f, x0, c: torch.ones(()), RuntimeError, "EnergyGuidance: The energy does not depend on x_t"),
    "no tensor": (lambda f, x0, c: 1.0, TypeError, "scalar tensor, or one number a sample.*got float"),
    "map": (lambda f, x0, c: x0.mean(1), TypeError, r"got shape \(2, 16, 16\)"),
    "channels": (lambda f, x0, c: x0.mean((0, 2, 3)).repeat(2), TypeError, r"got shape \(4,\)"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_energies_of_another_form_raise(name):
    fn, error, message = BAD[name]
    with pytest.raises(error, match=message):
        change(bare(), EnergyGuidance(fn))


def test_bad_settings_raise_and_touch_nothing():
    with pytest.raises(TypeError, match="takes a function"):
        EnergyGuidance(3)
    with pytest.raises(ValueError, match="update='adam'; it is one of eps, latent_sign, latent_adam"):
        EnergyGuidance(to_target, update="adam")
    with pytest.raises(ValueError, match="scale must be finite"):
        EnergyGuidance(to_target, scale=float("nan"))
    denoiser = bare()
    with pytest.raises(ValueError, match="No layer 'mid_blok'.*mid_block"):
        guide(denoiser, EnergyGuidance(of_layers, "mid_blok"))
    with pytest.raises(TypeError, match="full module path"):
        guide(denoiser, EnergyGuidance(of_layers, [3]))
    with pytest.raises(TypeError, match="full module path"):
        guide(denoiser, EnergyGuidance(of_layers, 3))
    with pytest.raises(ValueError, match="moves the latents.*scheduler="):
        guide(denoiser, EnergyGuidance(to_target, update="latent_sign"))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode.*no_grad"):
        change(denoiser, ENERGIES["x0"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.model.modules())
