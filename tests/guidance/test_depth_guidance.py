"""DepthGuidance: its parts against closed forms and differences, cost, whole pipelines, bad input."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional

from diffusers_repr import Denoiser, DepthGuidance, NoiseLevel, NoiseSchedule, guide
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import GenericFamily
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.guidance.depth import consistency, prior_energy
from diffusers_repr.heads import depth_layers, read_features
from tests.guidance.readout_cases import bare, depth, gradient, hooks_of, images, normal, read, slope
from tests.testers.cases import some
from tests.testers.models import build, unet2d

AT = 300


def heads(denoiser, dtype=None, **options):
    strong, weak = depth_layers(denoiser.model)
    return depth(denoiser, strong, dtype, **options), depth(denoiser, weak, dtype, **options)


def prior_of(dtype=torch.float64, predicts="epsilon", size=8):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = unet2d(1, sample_size=size).to(dtype).eval()
    return Denoiser(unet, DDIMScheduler(prediction_type=predicts))


def eps_gradient(denoiser, config, x, at=AT):
    """What is added to the network's output, over scale and sigma."""
    with torch.no_grad():
        plain = denoiser.model(x, at).sample
        with guide(denoiser, config.replace(scale=1e3)) as handle:
            guided = denoiser.model(x, at).sample
    return (guided - plain) / (1e3 * denoiser.level(at).sigma), handle.stats


# The parts


def test_consistency_against_differences_with_the_strong_branch_constant():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    strong, weak = heads(denoiser)
    found, stats = eps_gradient(denoiser, DepthGuidance(strong, weak, consistency_weight=2.5), x)
    fixed = read(denoiser, strong, x, AT)
    assert fixed.shape == (2, 1, 16, 24)

    def energy(x):
        return 2.5 * float((read(denoiser, weak, x, AT, size=(16, 24)) - fixed).abs().mean((1, 2, 3)).sum())

    ways, expected = slope(energy, x)
    torch.testing.assert_close((ways * found.flatten()).sum(1), expected, rtol=1e-6, atol=0)
    assert (stats.lanes, stats.passes, stats.backward_passes) == (1, 1, 1)

    def both(x):
        return 2.5 * (read(denoiser, weak, x, AT, size=(16, 24)) - read(denoiser, strong, x, AT)).abs().mean()

    ways, other = slope(lambda x: 2 * float(both(x)), x)  # without the stop: another gradient
    assert ((ways * found.flatten()).sum(1) / other - 1).abs().max() > 0.1


def test_nothing_of_the_strong_branch_is_differentiated():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    strong, weak = heads(denoiser)
    term = DepthGuidance(strong, weak).bind(denoiser)
    layers = term.gradient.layers
    maps = {k: v.requires_grad_() for k, v in read_features(denoiser, x, AT, None, layers).items()}
    call = NetworkCall({}, 1, BatchLanes(slice(0, 1)), x, denoiser.level(AT))
    loss = term.gradient.loss(maps, None, call, x).sum()
    assert torch.equal(loss, consistency(weak(maps, AT, (16, 24)), strong(maps, AT)).sum())
    sources = [*strong.parameters(), *maps.values(), *weak.parameters()]
    grads = torch.autograd.grad(loss, sources, allow_unused=True)
    count = len(list(strong.parameters()))
    assert all(g is None for g in grads[:count])
    (read_by_weak,) = weak.config["layers"]
    given = [path for path, g in zip(maps, grads[count:], strict=False) if g is not None]
    assert given == [read_by_weak]
    assert all(g is not None for g in grads[count + len(maps) :])


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_prior_against_differences(predicts):
    denoiser, x = bare(), normal(1, 2, 16, 24)
    strong, _ = heads(denoiser, label_range=(-3.0, 1.0))
    prior = prior_of(predicts=predicts)
    config = DepthGuidance(strong, prior=prior, prior_weight=0.7, prior_level=400, seed=5)
    found, stats = eps_gradient(denoiser, config, x)
    bar = prior.scheduler.alphas_cumprod[400].double()
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 1000 * AT)
    n = torch.randn(1, 1, 8, 8, generator=generator).double()

    @torch.no_grad()
    def energy(x):
        d = functional.interpolate((read(denoiser, strong, x, AT) + 3) / 2 - 1, (8, 8), mode="bilinear")
        noisy = alpha * d + sigma * n
        y = prior.model(noisy, 400).sample
        eps = {"epsilon": y, "v_prediction": alpha * y + sigma * noisy, "sample": (noisy - alpha * y) / sigma}
        return 0.7 * float((n - eps[predicts]).square().mean())

    ways, expected = slope(energy, x, step=1e-5)
    torch.testing.assert_close((ways * found.flatten()).sum(1), expected, rtol=2e-6, atol=0)
    assert (stats.lanes, stats.passes, stats.backward_passes) == (1, 1, 1)


def test_both_add_up():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    strong, weak = heads(denoiser)
    prior = prior_of()
    config = DepthGuidance(strong, weak, prior=prior, consistency_weight=3.0, prior_weight=0.5)
    both, _ = eps_gradient(denoiser, config, x)
    one, _ = eps_gradient(denoiser, config.replace(prior_weight=0.0), x)
    two, _ = eps_gradient(denoiser, config.replace(consistency_weight=0.0), x)
    torch.testing.assert_close(both, one + two, rtol=1e-6, atol=1e-11)
    alone, _ = eps_gradient(denoiser, config, x[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-6, atol=1e-11)


def test_the_prior_knows_a_gaussian():
    """eps of N(0, 1) maps is sigma (alpha d + sigma n): the energy is in closed form."""

    class Gaussian(torch.nn.Module):
        def forward(self, sample, timestep):
            return ((1 - bar) ** 0.5).to(sample) * sample

    family = GenericFamily("sample", "timestep", channels=1)
    prior = Denoiser(Gaussian(), DDIMScheduler(), family=family)
    bar = prior.scheduler.alphas_cumprod[600].double()
    maps, n = normal(2, 1, 4, 6), normal(2, 1, 4, 6, seed=1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    expected = (n - sigma * (alpha * maps + sigma * n)).square().mean((1, 2, 3))
    torch.testing.assert_close(prior_energy(maps, n, prior, prior.level(600)), expected, rtol=1e-6, atol=0)
    denoiser = bare()
    strong, _ = heads(denoiser)
    found, _ = eps_gradient(denoiser, DepthGuidance(strong, prior=prior, prior_level=600), normal(1, 2, 16, 24))
    assert found.abs().max() > 0


def test_noise_is_another_at_each_level_and_draws_from_nowhere_else():
    denoiser = bare()
    strong, _ = heads(denoiser)
    term = DepthGuidance(strong, prior=prior_of(), seed=1).bind(denoiser)
    state = torch.get_rng_state()

    def noise(at, count=1):
        x = normal(count, 2, 16, 24)
        call = NetworkCall({}, count, BatchLanes(slice(0, count)), x, denoiser.level(at))
        return term._noise(torch.zeros(count, 1, 8, 8), call)

    assert torch.equal(noise(300), noise(300))
    assert torch.equal(noise(300, 3)[2:], noise(300))
    assert not torch.equal(noise(300), noise(301))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("update", ["latent_sign", "latent_adam"])
def test_a_step_lowers_the_energy(update):
    denoiser, x = bare(), normal(2, 2, 16, 24)
    strong, weak = heads(denoiser)
    denoiser.scheduler.set_timesteps(10)
    seen = []
    hook = denoiser.model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    config = DepthGuidance(strong, weak, update=update, scale=1e-3)
    with torch.no_grad(), guide(denoiser, config, scheduler=denoiser.scheduler) as handle:
        denoiser.model(x, AT)
    hook.remove()
    fixed = read(denoiser, strong, x, AT)

    def energy(x):
        return consistency(read(denoiser, weak, x, AT, size=(16, 24)), fixed)

    assert bool((energy(seen[-1]) < energy(x)).all())
    step = handle.stats.steps[0]
    assert (step.lanes, step.passes, step.backward_passes) == (2, 2, 1)


def test_the_forward_is_left_after_the_last_layer_where_only_gradients_are_wanted():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    strong = depth(denoiser, ["up_blocks.0.resnets.0", "up_blocks.0.resnets.1"])
    weak = depth(denoiser, ["up_blocks.0.resnets.1"])
    denoiser.scheduler.set_timesteps(10)
    ends = []
    denoiser.model.up_blocks[1].register_forward_hook(lambda *args: ends.append(1))
    config = DepthGuidance(strong, weak, update="latent_sign")
    with torch.no_grad(), guide(denoiser, config, scheduler=denoiser.scheduler):
        denoiser.model(x, AT)
    assert len(ends) == 1


def test_gradient_equals_plain_autograd():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    strong, weak = heads(denoiser)

    def loss(maps):
        with torch.no_grad():
            fixed = strong(maps, AT)
        return (weak(maps, AT, (16, 24)) - fixed).abs().mean((1, 2, 3))

    expected = gradient(denoiser, strong.config["layers"], loss, x, AT)
    found, _ = eps_gradient(denoiser, DepthGuidance(strong, weak), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


# Whole pipelines


@pytest.mark.parametrize(
    ("name", "guidance_scale"),
    some([("ddim", None), ("sd", 4.0), ("dit", 4.0), ("sd3", 1.0)], ("ddim", None), ("sd", 4.0)),
)
def test_whole_pipelines(name, guidance_scale):
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    ends = {"level_range": (0, 800)} if name != "sd3" else {}
    strong, weak = heads(denoiser, **ends)
    plain = images(pipe, name, 1, guidance_scale, steps=5)
    with guide(pipe, DepthGuidance(strong, weak, scale=0.0)):
        assert torch.equal(images(pipe, name, 1, guidance_scale, steps=5), plain)
    config = DepthGuidance(strong, weak, prior=prior_of(torch.float32), scale=50.0)
    with guide(pipe, config) as handle:
        guided = images(pipe, name, 1, guidance_scale, steps=5)
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-4
    lanes = 1 + (guidance_scale == 4.0)
    for step in handle.stats.steps:
        acts = float(step.level.timestep) <= 800 if name != "sd3" else float(step.level.alpha) > 0
        assert step.backward_passes == acts
        assert step.lanes == lanes
    assert 0 < handle.stats.backward_passes <= 5
    assert hooks_of(denoiser.model) == hooks_of(config.prior.model) == 0
    assert all(p.requires_grad and p.grad is None for p in config.prior.model.parameters())


def test_everything_is_restored_after_an_exception():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    strong, weak = heads(denoiser)
    prior = prior_of()
    prior.model.train()
    hook = prior.model.conv_out.register_forward_pre_hook(lambda module, args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError), guide(denoiser, DepthGuidance(strong, prior=prior)):
        denoiser.model(x, AT)
    hook.remove()
    assert hooks_of(denoiser.model) == 0
    assert torch.is_grad_enabled()
    assert prior.model.training
    for model in (denoiser.model, strong, weak, prior.model):
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


# Bad input


def test_bad_settings():
    denoiser = bare(dtype=torch.float32)
    strong, weak = heads(denoiser)
    for options, what in (
        ({}, "nothing to do"),
        ({"weak": weak, "consistency_weight": 0.0}, "nothing to do"),
        ({"weak": weak, "consistency_weight": -1.0}, "at least 0"),
        ({"weak": weak, "prior_weight": float("nan")}, "finite"),
        ({"weak": weak, "update": "mean"}, "latent_adam"),
    ):
        with pytest.raises(ValueError, match=what):
            DepthGuidance(strong, **options)
    with pytest.raises(TypeError, match="as weak"):
        DepthGuidance(strong, torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="prior must be a Denoiser"):
        DepthGuidance(strong, prior=torch.nn.Linear(2, 2))


def test_what_the_model_refuses():
    denoiser = bare(dtype=torch.float32)
    strong, weak = heads(denoiser)
    other = depth(bare(3, torch.float32), weak.config["layers"])
    with pytest.raises(ValueError, match="Wrong base for this DepthHead"):
        guide(denoiser, DepthGuidance(strong, other))
    with pytest.raises(ValueError, match="strong gives 1 channels, weak 2"):
        guide(denoiser, DepthGuidance(strong, depth(denoiser, weak.config["layers"], out_channels=2)))
    with pytest.raises(ValueError, match="takes 3 channels; the strong head gives maps of 1"):
        guide(denoiser, DepthGuidance(strong, prior=Denoiser(unet2d(3), DDIMScheduler())))
    with pytest.raises(ValueError, match="of a VAE"):
        guide(denoiser, DepthGuidance(strong, prior=Denoiser.from_pipe(build("sd"))))
    with pytest.raises(ValueError, match="1000"):
        guide(denoiser, DepthGuidance(strong, prior=prior_of(), prior_level=1000))
    flow = Denoiser(prior_of().model, schedule=NoiseSchedule("flow", "velocity"))
    with pytest.raises(ValueError, match="without noise"):
        guide(denoiser, DepthGuidance(strong, prior=flow, prior_level=NoiseLevel(nsr=0)))
    early, late = (depth(denoiser, weak.config["layers"], level_range=ends) for ends in ((0, 100), (200, 300)))
    with pytest.raises(ValueError, match="level_range of each head"):
        guide(denoiser, DepthGuidance(early, late))
    assert hooks_of(denoiser.model) == 0
