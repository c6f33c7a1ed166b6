"""The cosine path of flow models, and the schedulers that tell their path."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_repr.models import describe_process
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction, add_noise, sampler_level
from diffusers_repr.noise.targets import training_target
from schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

COSINE = NoiseSchedule("cosine_flow", "velocity")
LINEAR = NoiseSchedule("flow", "velocity")


def of_time(schedule, t):
    return schedule.resolve(1000.0 * t)


@pytest.mark.parametrize(("schedule", "delta"), [(LINEAR, 1.0), (COSINE, math.pi / 2)])
def test_ends_and_delta(schedule, delta):
    """x_0 at t = 0 and noise at t = 1, exactly; alpha sigma' - alpha' sigma is the same at all times."""
    first, last = of_time(schedule, 0.0), of_time(schedule, 1.0)
    assert (first.alpha, first.sigma, last.alpha, last.sigma) == (1.0, 0.0, 0.0, 1.0)
    for t in (0.0, 0.1, 0.5, 0.93, 1.0):
        at = of_time(schedule, t)
        assert at.alpha * at.sigma_dot - at.alpha_dot * at.sigma == pytest.approx(delta, abs=1e-12)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.5, 0.77, 0.98])
def test_cosine_formula_and_derivatives(t):
    at, h = of_time(COSINE, t), 1e-5
    assert at.alpha == pytest.approx(math.cos(math.pi * t / 2), abs=1e-7)
    assert at.sigma == pytest.approx(math.sin(math.pi * t / 2), abs=1e-7)
    before, after = COSINE._process(torch.tensor([1000 * (t - h), 1000 * (t + h)], dtype=torch.float64))[:2]
    assert at.alpha_dot == pytest.approx(float(before[1] - before[0]) / (2 * h), rel=1e-8)
    assert at.sigma_dot == pytest.approx(float(after[1] - after[0]) / (2 * h), rel=1e-8)


def test_cosine_levels_by_ratio():
    """From sigma / alpha and back, one level for all and one a sample; infinite is pure noise."""
    assert COSINE.resolve(NoiseLevel(nsr=1.0)).timestep == pytest.approx(500.0, abs=1e-10)
    assert COSINE.resolve(NoiseLevel(half_log_snr=0.0)).alpha == pytest.approx(0.5**0.5)
    assert COSINE.resolve(NoiseLevel(nsr=math.inf)).timestep == 1000.0
    assert COSINE.resolve(NoiseLevel(nsr=0.0)).timestep == 0.0
    times = torch.tensor([1e-3, 0.4, 333.3, 999.999])
    again = COSINE.resolve(NoiseLevel(nsr=COSINE.resolve(times).nsr.double()))
    torch.testing.assert_close(again.timestep, times, rtol=1e-5, atol=0)
    # The ratio says how much there is of either, whatever the path.
    one, two = (schedule.resolve(NoiseLevel(nsr=0.3)) for schedule in (COSINE, LINEAR))
    assert one.sigma / one.alpha == pytest.approx(two.sigma / two.alpha)
    assert one.timestep != pytest.approx(two.timestep)
    with pytest.raises(ValueError, match=r"timestep 1001.0 is outside \[0, 1000\], the range of this cosine_flow"):
        COSINE.resolve(1001.0)


def test_processes_differ():
    assert not COSINE.same_process(LINEAR)
    assert COSINE.same_process(NoiseSchedule("cosine_flow", "epsilon"))
    with pytest.raises(ValueError, match="another noise process"):
        LINEAR.resolve(COSINE.resolve(500.0))
    assert describe_process(COSINE)["noise_schedule"] == {"kind": "cosine_flow"}


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_a_perfect_velocity_tells_data_and_noise(t):
    x0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double().unbind()
    level = of_time(COSINE, t)
    x_t = add_noise(x0, level, noise)
    target = training_target(x0, noise, level, COSINE)
    # the derivative of the path itself
    quarter = math.pi / 2
    wanted = quarter * (math.cos(quarter * t) * noise - math.sin(quarter * t) * x0)
    torch.testing.assert_close(target, wanted)
    got = Prediction(target, x_t, level, COSINE)
    torch.testing.assert_close(got.x0, x0)
    torch.testing.assert_close(got.eps, noise)


@pytest.mark.parametrize("scheduler_class", [FlowMatchSDEScheduler, FlowMatchODEScheduler])
@pytest.mark.parametrize(("path", "kind"), [("linear", "flow"), ("cosine", "cosine_flow")])
def test_from_scheduler(scheduler_class, path, kind):
    schedule = NoiseSchedule.from_scheduler(scheduler_class(num_train_timesteps=500, path=path))
    assert (schedule.kind, schedule.output, schedule.num_train_timesteps) == (kind, "velocity", 500)
    # What the schedule mixes is what the scheduler's own add_noise does.
    scheduler, times = scheduler_class(path=path), torch.tensor([3.0, 500.0, 999.0])
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).unbind()
    own = add_noise(x0, NoiseSchedule.from_scheduler(scheduler).resolve(times), noise)
    torch.testing.assert_close(own, scheduler.add_noise(x0, noise, times))


def test_an_unknown_path():
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert NoiseSchedule.from_scheduler(scheduler).kind == "flow"
    scheduler.register_to_config(path="spiral")
    with pytest.raises(ValueError, match="path='spiral'; known: linear, cosine"):
        NoiseSchedule.from_scheduler(scheduler)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchSDEScheduler, FlowMatchODEScheduler, lambda path: FlowMatchODEScheduler(path=path, solver="heun")],
)
def test_each_step_of_a_run_is_read(path, scheduler):
    """At each network call, repeated ones too: the closed form at its t; the scheduler stays as it was."""
    scheduler = scheduler(path=path)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    held = [tensor.clone() for tensor in (scheduler.timesteps, scheduler.sigmas)]
    for timestep in scheduler.timesteps:
        t = float(timestep) / 1000
        at = sampler_level(scheduler, timestep, schedule)
        expected = (1 - t, t) if path == "linear" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
        assert (at.level.alpha, at.level.sigma) == pytest.approx(expected, abs=1e-7)
        assert at.scale == 1.0
        reference = schedule.resolve(float(timestep))
        assert at.level.alpha_dot == pytest.approx(reference.alpha_dot)
        assert at.level.sigma_dot == pytest.approx(reference.sigma_dot)
        scheduler.step(torch.zeros(1, 1), timestep, torch.ones(1, 1))
    assert torch.equal(held[0], scheduler.timesteps)
    assert torch.equal(held[1], scheduler.sigmas)


def test_sampler_of_another_path_is_refused():
    scheduler = FlowMatchODEScheduler(path="cosine")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"another process \(cosine_flow\) than the network was trained on \(flow\)"):
        sampler_level(scheduler, scheduler.timesteps[0], LINEAR)


def test_levels_are_read_again_for_a_new_grid():
    scheduler = FlowMatchODEScheduler(path="cosine")
    scheduler.set_timesteps(2)
    first = sampler_level(scheduler, 500.0, COSINE).level
    scheduler.set_timesteps(timesteps=[800.0, 500.0])
    assert sampler_level(scheduler, 500.0, COSINE).level.alpha == pytest.approx(first.alpha)
    assert sampler_level(scheduler, 800.0, COSINE).level.sigma == pytest.approx(math.sin(0.4 * math.pi))
