"""What both schedulers share: diffusers' interface, grids of one's own, the forward process."""

import numpy as np
import pytest
import torch
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from tests.schedulers.gaussian import path

both = pytest.mark.parametrize("cls", [FlowMatchODEScheduler, FlowMatchSDEScheduler])


@both
def test_interface(cls):
    scheduler = cls()
    assert len(scheduler) == len(scheduler.timesteps) == 1000
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.step_index is None
    x = torch.ones(2, 3)
    assert scheduler.scale_model_input(x, 5) is x
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps[0] == 1000
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 1, 2, 3]


@both
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_own_grids(cls, name):
    scheduler = cls(path=name)
    times = [900.0, 400.0, 100.0]
    sigmas = [path(name, t / 1000)[1] for t in times]
    for given in (
        {"timesteps": times},
        {"timesteps": torch.tensor(times)},
        {"sigmas": sigmas},
        {"sigmas": np.array(sigmas)},
        {"num_inference_steps": 3, "timesteps": times},
    ):
        scheduler.set_timesteps(**given)
        assert scheduler.timesteps.tolist() == pytest.approx(times, abs=1e-3)
        assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0], abs=1e-6)
        assert scheduler.num_inference_steps == 3


@both
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"timesteps": [100, 200]}, "timesteps must fall"),
        ({"timesteps": [200, 200, 100]}, "timesteps must fall"),
        ({"timesteps": [500, 0]}, "the end, 0, is added"),
        ({"timesteps": [1001, 5]}, r"within \(0, 1000\]"),
        ({"sigmas": [2.0, 0.5]}, r"within \(0, 1\]"),
        ({"timesteps": [float("nan")]}, "timesteps must fall"),
        ({"timesteps": []}, "list of numbers"),
        ({"timesteps": [5], "sigmas": [0.5]}, "not both"),
        ({"num_inference_steps": 3, "timesteps": [5]}, "timesteps has 1"),
        ({"num_inference_steps": -3}, "or more"),
    ],
)
def test_bad_grids(cls, given, told):
    scheduler = cls()
    scheduler.set_timesteps(5)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match=told):
        scheduler.set_timesteps(**given)
    assert scheduler.timesteps is before


@both
def test_bad_steps(cls):
    scheduler, x = cls(), torch.ones(2, 4)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="first half of the channels"):
        scheduler.step(torch.ones(2, 8), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="Timestep 7 is no step of this FlowMatch"):
        scheduler.step(x, 7.0, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="has done its 2 steps"):
        scheduler.step(x, t, x)


@both
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_forward_process(cls, name):
    scheduler = cls(path=name)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([0.0, 333.3, 1000.0], dtype=torch.float64)
    got = scheduler.add_noise(x0, noise, times)
    for i, t in enumerate(times.tolist()):
        alpha, sigma, *_ = path(name, t / 1000)
        torch.testing.assert_close(got[i], alpha * x0[i] + sigma * noise[i], rtol=0, atol=1e-14)
    torch.testing.assert_close(got[0], x0[0], rtol=0, atol=0)
    assert torch.equal(scheduler.scale_noise(x0, times, noise), got)
    assert torch.equal(scheduler.add_noise(x0, noise, 250), scheduler.add_noise(x0, noise, torch.full((3,), 250)))
    half = scheduler.add_noise(x0.bfloat16(), noise.bfloat16(), times)
    want = scheduler.add_noise(x0.bfloat16().double(), noise.bfloat16().double(), times)
    assert torch.equal(half, want.bfloat16())  # rounded once
    with pytest.raises(ValueError, match=r"\[0, 1000\]"):
        scheduler.add_noise(x0, noise, 1200.0)
