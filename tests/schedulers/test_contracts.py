"""diffusers' contracts of a scheduler, for each of ours; and where a shifted sampler stands."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from diffusers_repr.denoiser.sampling import dynamic_mu
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, sampler_level
from tests.pipelines.sit_cases import noise, ode_loop, pipeline
from tests.testers.schedulers import SchedulerContract

SHIFT = {"num_train_timesteps": 500, "path": "cosine", "shift": 2.5, "base_shift": 0.4, "max_shift": 1.2}
SHIFT |= {"base_image_seq_len": 64, "max_image_seq_len": 1024, "time_shift_type": "linear"}


class TestODE(SchedulerContract):
    cls, other = FlowMatchODEScheduler, FlowMatchSDEScheduler
    settings = {**SHIFT, "solver": "heun"}


class TestSDE(SchedulerContract):
    cls, other, fewest = FlowMatchSDEScheduler, FlowMatchODEScheduler, 2
    settings = {**SHIFT, "diffusion": "sigma", "diffusion_scale": 0.5, "last_t": 0.02, "first_t": 0.98}


def test_an_even_grid_is_shifted_from_end_to_end():
    """The default grid of the ODE is that of FLUX's pipeline; the SDE keeps its two ends, whatever the shift."""
    ode, euler = FlowMatchODEScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    ode.set_timesteps(6)
    euler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    torch.testing.assert_close(ode.timesteps, euler.timesteps, rtol=1e-6, atol=0)
    for name in ("linear", "cosine"):
        sde = FlowMatchSDEScheduler(shift=3.0, first_t=0.95, last_t=0.03, path=name)
        sde.set_timesteps(6)
        assert sde.timesteps[[0, -1]].tolist() == pytest.approx([950, 30])
        plain = FlowMatchSDEScheduler(first_t=0.95, last_t=0.03, path=name)
        plain.set_timesteps(6)
        assert (sde.timesteps[1:-1] > plain.timesteps[1:-1]).all()


@pytest.mark.parametrize("cls", [FlowMatchODEScheduler, FlowMatchSDEScheduler])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_where_a_shifted_sampler_stands(cls, path, settings):
    """At the level of the timestep that the network is told; features at a timestep know of no shift."""
    scheduler = cls(path=path, **settings)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.same_process(NoiseSchedule.from_scheduler(cls(path=path)))
    assert schedule.resolve(500).sigma == pytest.approx(0.5 if path == "linear" else 0.5**0.5)
    scheduler.set_timesteps(4, mu=0.9)
    x = torch.ones(1, 1)
    for index, t in enumerate(scheduler.timesteps):
        at = sampler_level(scheduler, t, schedule)
        assert at.scale == 1
        assert at.level.timestep == float(t)
        assert at.level.sigma == pytest.approx(float(scheduler.sigmas[index]), abs=1e-6)
        assert at.level.nsr == pytest.approx(schedule.resolve(NoiseLevel(timestep=float(t))).nsr)
        x = scheduler.step(x, t, x).prev_sample


@torch.no_grad()
def test_a_shifted_pipeline_is_a_loop_on_the_shifted_grid():
    pipe, labels = pipeline(FlowMatchODEScheduler(shift=3.0)).to(torch.float64), torch.tensor([3, 1])
    call = {"class_labels": labels, "latents": noise(), "num_inference_steps": 5, "output_type": "latent"}
    x = noise()
    grid = [3 * t / (1 + 2 * t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)] + [0.0]
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        x = x + (after - t) * pipe.transformer(x, torch.tensor(1000 * t), labels).sample
    got = pipe(**call).images
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)
    assert float((got - ode_loop(pipe.transformer, noise(), labels, 5)).abs().max()) > 1e-3
    # a dynamic shift goes by the tokens of the image: 16 of an 8 x 8 image in patches of 2
    settings = {"base_shift": 0.5, "max_shift": 1.5, "base_image_seq_len": 16, "max_image_seq_len": 64}
    for cls in (FlowMatchODEScheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = cls(use_dynamic_shifting=True, **settings)
        want = cls(use_dynamic_shifting=True)
        for latents, mu in ((noise(), 0.5), (torch.cat([noise()] * 4, 2), 1.5)):
            pipe(**{**call, "latents": latents, "num_inference_steps": 2})
            want.set_timesteps(2, mu=mu)
            assert torch.equal(pipe.scheduler.timesteps, want.timesteps)
    assert dynamic_mu(settings, 32) == pytest.approx(0.5 + 1 / 3)
