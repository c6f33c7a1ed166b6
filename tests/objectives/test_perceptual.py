"""The perceptual stage: its formula for every form of network, no loss where there is none, who gets a gradient."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_repr import Denoiser, DiffusionObjective, GenericFamily
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction
from diffusers_repr.objectives import PerceptualLoss, PerceptualObjective, TimeSampler
from diffusers_repr.objectives.perceptual import noised_again
from diffusers_repr.testing import check_auxiliary_loss, check_objective, tiny_denoiser
from tests.objectives.cases import COSINE, LINEAR, batch, sit
from tests.testers.models import build

ZERO_SNR = DDPMScheduler(
    100, beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
)
VP = {kind: NoiseSchedule.from_scheduler(DDPMScheduler(100, prediction_type=kind))
      for kind in ("epsilon", "v_prediction", "sample")}  # fmt: skip
SCHEDULES = {"linear": LINEAR, "cosine": COSINE, **VP, "zero": NoiseSchedule.from_scheduler(ZERO_SNR)}


class Fixed(TimeSampler):
    """Times that are told."""

    def __init__(self, times):
        super().__init__()
        object.__setattr__(self, "times", times)

    def draw(self, schedule, count, generator=None):
        return schedule.resolve(torch.tensor(self.times, dtype=torch.float64))


class Tiny(nn.Module):
    """A convolution, a middle and an end; any float dtype."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mid_block = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, sample, timestep):
        h = self.first(sample) * (1 + timestep.view(-1, 1, 1, 1).to(sample) / 1000)
        return self.last(self.mid_block(h.tanh()).tanh())


def tiny(schedule):
    return Denoiser(Tiny().double(), schedule=schedule, family=GenericFamily(channels=2))


def given(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise


def factors(name, t):
    """alpha, sigma, alpha_dot, sigma_dot in float64, written apart from the package."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if name == "linear":
        return 1 - t / 1000, t / 1000, -1.0, 1.0
    if name == "cosine":
        angle = math.pi / 2 * t / 1000
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()
    if name == "zero":
        root = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 100, dtype=torch.float64) ** 2, 0).sqrt()
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1]))[t.long()] ** 2
    else:
        kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 100, dtype=torch.float64), 0)[t.long()]
    return kept.sqrt(), (1 - kept).sqrt(), None, None


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_by_hand(name):
    """Network, conversion, renoising and features written out; the features are those of a hooked full forward."""
    schedule = SCHEDULES[name]
    times = [20, 50, 99] if schedule.kind == "vp" else [120.0, 500.0, 870.0]
    others = [70, 3, 40] if schedule.kind == "vp" else [700.0, 30.0, 450.5]
    denoiser, (x0, noise) = tiny(schedule), given()
    objective = PerceptualObjective(denoiser, perceptual_times=Fixed(others))
    t, other = torch.tensor(times), torch.tensor(others)
    x_t_level = [part.view(-1, 1, 1, 1) if isinstance(part, torch.Tensor) and part.ndim else part
                 for part in factors(name, t)]  # fmt: skip
    a, s, a_dot, s_dot = x_t_level
    a2, s2 = (part.view(-1, 1, 1, 1) for part in factors(name, other)[:2])
    net, seen = denoiser.model, []
    handle = objective.losses["perceptual"].frozen.mid_block.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        x_t = a * x0 + s * noise
        out = net(x_t, t)
        if name in ("linear", "cosine"):
            delta = a * s_dot - a_dot * s
            x0_hat, eps_hat = (s_dot * x_t - s * out) / delta, (a * out - a_dot * x_t) / delta
        elif name == "epsilon":
            x0_hat, eps_hat = (x_t - s * out) / a, out
        elif name == "sample":
            x0_hat, eps_hat = out, (x_t - a * out) / s
        else:
            x0_hat, eps_hat = a * x_t - s * out, s * x_t + a * out
        features = []
        for z in (a2 * x0_hat + s2 * eps_hat, a2 * x0 + s2 * noise):
            net.mid_block.register_forward_hook(lambda m, i, found: features.append(found))
            net(z, other)
            net.mid_block._forward_hooks.clear()
        handle.remove()
        wanted = (features[0] - features[1]).square().mean()
    got = objective({"pixel_values": x0.float(), "noise": noise.float(), "time": t})
    assert float(got["perceptual"]) == pytest.approx(float(wanted), rel=2e-4)
    assert torch.equal(got["loss"].detach(), got["perceptual"])
    assert got["denoising"] > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_loss_at_equal_times_and_for_a_perfect_network(name):
    schedule = SCHEDULES[name]
    times = [20, 50, 98] if schedule.kind == "vp" else [120.0, 500.0, 870.0]
    denoiser, (x0, noise) = tiny(schedule), given()
    level = schedule.resolve(torch.tensor(times, dtype=torch.float64))
    a, s, *_ = (part.view(-1, 1, 1, 1) if isinstance(part, torch.Tensor) and part.ndim else part
                for part in factors(name, torch.tensor(times)))  # fmt: skip
    output = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    x_t = a * x0 + s * noise
    same = noised_again(Prediction(output, x_t, level, schedule), level)
    assert (same - x_t).abs().max() < 1e-5  # the levels' alpha and sigma are float32
    with torch.no_grad():
        wanted = denoiser.model.mid_block(denoiser.model.first(x_t).tanh())
    loss = (denoiser.model.mid_block(denoiser.model.first(same).tanh()) - wanted).square().mean()
    assert loss < 1e-10
    assert torch.autograd.grad(loss, output)[0].abs().max() < 1e-6
    if name == "epsilon":
        exact = Prediction(noise, x_t, level, schedule)
        for other in ([1, 40, 99], [60, 60, 60]):
            to = schedule.resolve(torch.tensor(other, dtype=torch.float64))
            a2, s2 = (part.view(-1, 1, 1, 1) for part in factors(name, torch.tensor(other))[:2])
            assert (noised_again(exact, to) - a2 * x0 - s2 * noise).abs().max() < 1e-5


class Oracle(nn.Module):
    """Predicts what is asked for, whatever comes; its middle reads its input."""

    def __init__(self, answer):
        super().__init__()
        self.mid_block, self.scale = nn.Conv2d(2, 3, 3), nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, sample, timestep):
        self.mid_block(sample)
        return self.scale * self.answer


@pytest.mark.parametrize("name", ["linear", "epsilon", "v_prediction"])
def test_a_perfect_prediction_costs_nothing_at_any_time(name):
    schedule, (x0, noise) = SCHEDULES[name], (part.float() for part in given())
    t = torch.tensor([20, 50, 90])
    a, s = (part.view(-1, 1, 1, 1).float() for part in factors(name, t)[:2])
    answer = {"linear": noise - x0, "epsilon": noise, "v_prediction": a * noise - s * x0}[name]
    denoiser = Denoiser(Oracle(answer), schedule=schedule, family=GenericFamily(channels=2))
    objective = PerceptualObjective(denoiser)
    for seed in range(4):
        torch.manual_seed(seed)
        out = objective({"pixel_values": x0, "noise": noise, "time": t})
        assert out["perceptual"] < 1e-7
        assert out["denoising"] < 1e-9
    with torch.no_grad():
        denoiser.model.scale.mul_(1.3)
    assert objective({"pixel_values": x0, "noise": noise, "time": t})["perceptual"] > 1e-4


@pytest.mark.parametrize("name", ["linear", "epsilon", "v_prediction"])
def test_the_gradient_in_the_prediction_is_that_of_finite_differences(name):
    schedule, (x0, noise) = SCHEDULES[name], given()
    denoiser, t = tiny(schedule), torch.tensor([20.0, 50.0, 90.0]).double()
    loss = PerceptualLoss(time_sampling=Fixed([70.0, 5.0, 33.0]))
    objective = DiffusionObjective(denoiser, losses=[loss])
    noisy = objective.noised({"pixel_values": x0, "noise": noise, "time": t}, x0=x0)

    def at(prediction):
        return loss(objective.observation(noisy, prediction, {}))

    output = denoiser.model(noisy.x_t, t).detach().requires_grad_()
    (slope,) = torch.autograd.grad(at(output), output)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        way = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            found = (at(output + 1e-5 * way) - at(output - 1e-5 * way)) / 2e-5
        assert float(found) == pytest.approx(float((slope * way).sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "class_unet", "sit", "sd"])
def test_the_frozen_copy_stays_as_it_was_and_stops_at_the_middle(name):
    """It gets no gradient, runs nothing behind the middle, and its features are those of a hooked full forward."""
    denoiser = sit() if name == "sit" else Denoiser.from_pipe(build(name))
    objective = PerceptualObjective(denoiser, label_dropout=0.5).train()
    loss = objective.losses["perceptual"]
    assert loss.layer == ("blocks.0" if name == "sit" else "mid_block")
    before, ran = {k: v.clone() for k, v in loss.frozen.state_dict().items()}, []
    behind = loss.frozen.proj_out if name == "sit" else loss.frozen.up_blocks[0]
    behind.register_forward_hook(lambda module, args, out: ran.append(1))
    size = denoiser.image_size
    given = {"pixel_values": torch.rand(3, denoiser.image_channels, *size) * 2 - 1, "caption": ["a", "", "b"],
             "class_labels": torch.tensor([0, 1, 0])}  # fmt: skip
    torch.manual_seed(0)
    objective(given)["loss"].backward()
    assert not ran
    assert all(p.grad is None for p in loss.frozen.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in objective.network.parameters()) > 5
    optimizer = torch.optim.SGD(objective.network.parameters(), 0.1)
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in loss.frozen.state_dict().items())
    noisy = objective.noised(given)
    kept = []
    middle = loss.frozen.get_submodule(loss.layer)
    middle.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        early = loss.middle(noisy.x_t, noisy.level, noisy.condition)
        kept.clear()
        loss.frozen(**denoiser.network_inputs(noisy.x_t, noisy.level, noisy.condition))
    assert ran
    assert torch.equal(early, kept[0])


def test_x0_is_bounded_as_the_scheduler_has_it_and_x_t_stays():
    schedule, (x0, noise) = VP["epsilon"], given()
    level = schedule.resolve(torch.tensor([95, 95, 95]))
    a, s = (part.view(-1, 1, 1, 1) for part in factors("epsilon", torch.tensor([95, 95, 95]))[:2])
    prediction = Prediction(3 * noise, a * x0 + s * noise, level, schedule)
    assert prediction.x0.abs().max() > 2
    clean = noised_again(prediction, NoiseLevel(0.0, alpha=1.0, sigma=0.0), clip=0.8)
    torch.testing.assert_close(clean, prediction.x0.clamp(-0.8, 0.8))
    torch.testing.assert_close(noised_again(prediction, level, clip=0.8), prediction.x_t, rtol=1e-5, atol=1e-5)
    pipe = build("ddpm")
    bounds = {}
    for clip in (True, False):
        pipe.scheduler = DDPMScheduler(clip_sample=clip, clip_sample_range=1.5)
        bounds[clip] = PerceptualObjective(Denoiser.from_pipe(pipe)).losses["perceptual"].clip_x0
    assert bounds == {True: 1.5, False: 0.0}


def test_it_keeps_the_contracts():
    check_auxiliary_loss(PerceptualLoss(weight=0.3))
    objective = PerceptualObjective(tiny_denoiser(), denoising_weight=0.25)
    objective.denoiser.pipe = build("ddpm")
    out = objective(batch())
    torch.testing.assert_close(out["loss"].detach(), out["perceptual"] + 0.25 * out["denoising"])
    other = PerceptualObjective(tiny_denoiser(), denoising_weight=0.25)
    with torch.no_grad():
        other.losses["perceptual"].frozen.proj_out.weight[0] += 1
    assert objective.identity() != other.identity()  # a run is not gone on with from another base
    check_objective(
        PerceptualObjective(Denoiser.from_pipe(build("ddpm"))), {"pixel_values": torch.zeros(2, 1, 16, 16)}
    )


@pytest.mark.parametrize(("call", "message"), [
    (lambda: PerceptualObjective(sit(), "blocks.9"), "Closest"),
    (lambda: PerceptualObjective(sit(), denoising_weight=-1.0), "denoising_weight is finite"),
    (lambda: PerceptualLoss(clip_x0=-1.0), "clip_x0 is 0"),
    (lambda: PerceptualLoss(weight=-1.0), "must be finite and not negative"),
])  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
