"""The ODE sampler: exact on Gaussians, of the order it claims, equal to loops written out and to diffusers' Euler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from tests.schedulers.gaussian import MEAN, STD, path, run, starts, velocity


@pytest.mark.parametrize(("solver", "ratio", "slack"), [("euler", 2, 0.1), ("heun", 4, 0.4)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_order_of_convergence_to_the_exact_map(name, solver, ratio, slack):
    x = starts()
    exact = MEAN + STD * x  # V(1) = 1, V(0) = STD^2
    scheduler = FlowMatchODEScheduler(path=name, solver=solver)
    errors = [float((run(scheduler, velocity(name), x, n)[-1] - exact).abs().max()) for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(ratio, abs=slack)
    assert errors[1] / errors[2] == pytest.approx(ratio, abs=slack)
    assert errors[2] < {"euler": 0.02, "heun": 4e-4}[solver]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_equals_a_loop_written_out(name, solver):
    x, network, calls, steps = starts(4), velocity(name), [], 7

    def counted(x, t):
        calls.append(float(t))
        return network(x, t)

    got = run(FlowMatchODEScheduler(path=name, solver=solver), counted, x, steps)[-1]
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i, (t, after) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        u = network(x, 1000 * t)
        there = x + (after - t) * u
        if solver == "heun" and i < steps - 1:
            there = x + (after - t) * (u + network(there, 1000 * after)) / 2
        x = there
    assert float((got - x).abs().max()) < 1e-6  # timesteps are float32
    assert len(calls) == (steps if solver == "euler" else 2 * steps - 1)


def test_euler_is_that_of_diffusers_on_the_same_grid():
    x, steps = starts(dtype=torch.float32), 20
    ours = FlowMatchODEScheduler()
    got = run(ours, velocity("linear"), x, steps)[-1]
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    for t in theirs.timesteps:
        x = theirs.step(velocity("linear")(x, t), t, x).prev_sample
    assert float((got - x).abs().max()) < 3e-6


def test_heun_names_inner_points_twice():
    scheduler = FlowMatchODEScheduler(solver="heun", path="cosine")
    scheduler.set_timesteps(3)
    assert scheduler.order == 2
    assert FlowMatchODEScheduler().order == 1
    third = 1000 / 3
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 2 * third, 2 * third, third, third])
    want = [path("cosine", float(t) / 1000)[1] for t in scheduler.timesteps]
    assert scheduler.sigmas.tolist() == pytest.approx([*want, 0.0])
    first, x = [], torch.ones(1)
    for t in scheduler.timesteps:
        first.append(scheduler.state_in_first_order)
        x = scheduler.step(x, t, x).prev_sample
    assert first == [True, False, True, False, True]
    assert scheduler.step_index == 5
    assert scheduler.state_in_first_order


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("how", ["begin_index", "timestep", "own grid"])
def test_begins_in_the_middle(solver, how):
    scheduler, network = FlowMatchODEScheduler(solver=solver), velocity("linear")
    whole = run(scheduler, network, starts(3), 6)
    order = scheduler.order
    x = whole[2 * order]
    if how == "own grid":
        scheduler.set_timesteps(timesteps=[1000 * k / 6 for k in (4, 3, 2, 1)])
        times = scheduler.timesteps
    else:
        scheduler.set_timesteps(6)
        times = scheduler.timesteps[2 * order :]
        if how == "begin_index":
            scheduler.set_begin_index(2 * order)
            assert scheduler.begin_index == 2 * order
    for t in times:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, whole[-1], rtol=0, atol=1e-6)


def test_a_correction_cannot_come_first():
    scheduler = FlowMatchODEScheduler(solver="heun")
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match=r"set_begin_index\(0\)"):
        scheduler.step(torch.ones(1), scheduler.timesteps[1], torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_state_keeps_its_dtype_whatever_that_of_the_network(dtype):
    scheduler = FlowMatchODEScheduler(solver="heun")
    scheduler.set_timesteps(2)
    x = torch.ones(2, 1, dtype=dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones(2, 1, dtype=torch.float16), t, x).prev_sample
    assert x.dtype == dtype
    assert x.tolist() == [[0.0], [0.0]]


def test_bad_input():
    with pytest.raises(ValueError, match="solver is one of euler, heun; got 'rk4'"):
        FlowMatchODEScheduler(solver="rk4")
    with pytest.raises(ValueError, match="path is one of linear, cosine; got 'vp'"):
        FlowMatchODEScheduler(path="vp")
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]
    with pytest.raises(ValueError, match="1 or more; got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="1 or more; got None"):
        scheduler.set_timesteps()
