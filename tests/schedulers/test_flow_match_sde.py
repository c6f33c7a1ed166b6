"""The SDE sampler against the exact affine recursions of Gaussian data, without Monte Carlo."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_repr.schedulers_ext import scheduling_flow_match_sde
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from tests.schedulers.gaussian import MEAN, STD, parts, path, run, starts, velocity


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(scheduling_flow_match_sde, "randn_tensor", lambda shape, **options: torch.zeros(shape))


def moments(scheduler, name, steps, start=(0.0, 1.0)):
    """Mean and std of the samples, from the scheduler's own steps of x = 0 and x = 1; needs `no_noise`."""
    scheduler.set_timesteps(steps)
    times = [*(scheduler.timesteps.double() / 1000).tolist(), 0.0]
    mean, variance = start
    for i, t in enumerate(scheduler.timesteps):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        zero, one = scheduler.step(velocity(name)(x, t), t, x).prev_sample[:, 0].tolist()
        added = scheduler.diffusion_at(times[i]) * (times[i] - times[i + 1]) if i < steps - 1 else 0.0
        mean, variance = (one - zero) * mean + zero, (one - zero) ** 2 * variance + added
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("name", "steps", "mean", "std"),
    [
        ("linear", 50, 0.7, 0.392116),
        ("linear", 250, 0.7, 0.393352),
        ("linear", 1000, 0.7, 0.393614),
        ("cosine", 50, 0.706743, 0.392558),
        ("cosine", 250, 0.702441, 0.392057),
        ("cosine", 1000, 0.701645, 0.391994),
    ],
)
def test_moments_of_the_recursion(no_noise, name, steps, mean, std):
    got = moments(FlowMatchSDEScheduler(path=name), name, steps)
    assert got == pytest.approx((mean, std), abs=1e-6)


def test_a_short_last_step_takes_the_bias_away(no_noise):
    mean, std = moments(FlowMatchSDEScheduler(last_t=0.001), "linear", 1000)
    assert mean == pytest.approx(MEAN, abs=1e-6)
    assert std == pytest.approx(0.3998, abs=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("diffusion", "scale"), [("sigma", 1.0), ("time", 0.5), ("g2", 1.0), ("zero", 1.0)])
def test_every_diffusion_has_the_marginals_of_the_flow(no_noise, name, diffusion, scale):
    settings = {"path": name, "diffusion": diffusion, "diffusion_scale": scale, "last_t": 0.001, "first_t": 0.99}
    alpha, sigma, *_ = path(name, 0.99)
    start = (alpha * MEAN, alpha**2 * STD**2 + sigma**2)
    assert moments(FlowMatchSDEScheduler(**settings), name, 1000, start) == pytest.approx((MEAN, STD), abs=3e-3)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion", ["time", "sigma", "g2"])
def test_one_step_is_the_formula_in_the_score(name, diffusion):
    """`x + (u - w/2 s) dt + sqrt(w |dt|) n`, with the exact score in place of the form in eps."""
    scheduler = FlowMatchSDEScheduler(path=name, diffusion=diffusion, diffusion_scale=0.7, first_t=0.9)
    states = run(scheduler, velocity(name), starts(5), 4, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    times = [0.9, 0.9 - 0.86 / 3, 0.9 - 2 * 0.86 / 3, 0.04, 0.0]
    for i, x in enumerate(states[:-1]):
        t, dt = times[i], times[i + 1] - times[i]
        alpha, sigma, alpha_dot, sigma_dot = path(name, t)
        w = {"time": 2 * t, "sigma": 2 * sigma, "g2": 2 * sigma * (sigma_dot - alpha_dot / alpha * sigma)}[diffusion]
        u, score = parts(name, t, x)
        want = x + (u - 0.35 * w * score) * dt
        if i < 3:
            want = want + math.sqrt(0.7 * w * -dt) * torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(states[i + 1], want, rtol=0, atol=1e-6)


def test_without_diffusion_it_is_the_ode():
    sde, ode = FlowMatchSDEScheduler(diffusion="zero"), FlowMatchODEScheduler()
    got = run(sde, velocity("linear"), starts(), 9)[-1]
    x = starts()
    ode.set_timesteps(sigmas=sde.sigmas[:-1])
    for t in ode.timesteps:
        x = ode.step(velocity("linear")(x, t), t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=1e-7)
    assert torch.equal(got, run(FlowMatchSDEScheduler(diffusion_scale=0.0), velocity("linear"), starts(), 9)[-1])


def test_stochastic_sampling_of_diffusers_is_another_thing():
    """It draws x at the next sigma anew from the estimate of x_0; the reverse SDE moves x."""
    ours, theirs = FlowMatchSDEScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    ours.set_timesteps(50)
    grid = ours.sigmas[:-1].tolist()
    theirs.set_timesteps(sigmas=grid)
    slopes = []
    for scheduler in (ours, theirs):
        t, ends = scheduler.timesteps[10], []
        for value in (0.0, 1.0):
            scheduler._step_index = 10
            x = torch.full((1, 1), value)
            u = velocity("linear")(x, t)
            seed = torch.manual_seed(0)  # theirs of diffusers 0.36 takes no other generator
            ends.append(scheduler.step(u, t, x, generator=seed).prev_sample.item())
        slopes.append(ends[1] - ends[0])
    t, after = grid[10], grid[11]
    u, score = (parts("linear", t, 1.0)[k] - parts("linear", t, 0.0)[k] for k in (0, 1))
    assert slopes[0] == pytest.approx(1 + (u - t * score) * (after - t), abs=1e-5)
    assert slopes[1] == pytest.approx((1 - after) * (1 - t * u), abs=1e-5)
    assert abs(slopes[0] - slopes[1]) > 0.1


def test_the_seed_decides_and_the_batch_does_not():
    def sample(rows):
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        x = torch.stack([torch.full((2, 3), float(row)) for row in rows])
        return run(FlowMatchSDEScheduler(), velocity("linear"), x, 5, generator=generators)[-1]

    whole = sample([0, 1, 2])
    assert torch.equal(whole, sample([0, 1, 2]))
    assert torch.equal(whole, torch.cat([sample([row]) for row in range(3)]))
    assert torch.equal(whole, sample([2, 0, 1])[[1, 2, 0]])


def test_one_generator():
    first, again, other = (
        run(FlowMatchSDEScheduler(), velocity("linear"), starts(2), 5, generator=torch.Generator().manual_seed(seed))[
            -1
        ]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 1e-2


def test_noise_is_float32_whatever_the_state():
    def sample(dtype, network):
        generator = torch.Generator().manual_seed(0)
        return run(FlowMatchSDEScheduler(), network, torch.ones(3, 1, dtype=dtype), 5, generator=generator)[-1]

    exact = sample(torch.float64, velocity("linear"))
    single = sample(torch.float32, velocity("linear"))
    rough = sample(torch.float32, lambda x, t: velocity("linear")(x, t).bfloat16())
    assert (exact.dtype, single.dtype, rough.dtype) == (torch.float64, torch.float32, torch.float32)
    assert float((exact - single).abs().max()) < 1e-6
    assert float((exact - rough).abs().max()) < 2e-2


def test_begins_in_the_middle():
    scheduler, network = FlowMatchSDEScheduler(), velocity("linear")
    scheduler.set_timesteps(6)
    x, seed = starts(3), torch.Generator().manual_seed(0)
    scheduler.set_begin_index(2)
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(network(x, t), t, x, generator=seed).prev_sample
    again, seed = starts(3), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(timesteps=scheduler.timesteps[2:])
    for t in scheduler.timesteps:
        again = scheduler.step(network(again, t), t, again, generator=seed).prev_sample
    torch.testing.assert_close(x, again, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"path": "vp"}, "path is one of linear, cosine; got 'vp'"),
        ({"diffusion": "none"}, "diffusion is one of time, sigma, g2, zero; got 'none'"),
        ({"diffusion_scale": -1.0}, "0 or larger; got -1"),
        ({"diffusion_scale": math.nan}, "0 or larger; got nan"),
        ({"last_t": 0.0}, "last_t=0.0"),
        ({"last_t": 0.5, "first_t": 0.4}, "first_t=0.4"),
        ({"first_t": 1.1}, "first_t=1.1"),
        ({"num_train_timesteps": 0}, "1 or more; got 0"),
    ],
)
def test_bad_settings(settings, told):
    with pytest.raises(ValueError, match=told):
        FlowMatchSDEScheduler(**settings)


def test_bad_steps():
    scheduler = FlowMatchSDEScheduler()
    for steps in (0, 1, None):
        with pytest.raises(ValueError, match=f"2 or more.*got {steps}"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="infinite at t = 1"):
        FlowMatchSDEScheduler(diffusion="g2").set_timesteps(5)
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator()])
