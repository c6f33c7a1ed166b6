"""DDIM both ways: closed forms, diffusers' schedulers and a step table as oracles; the error of the steps."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_repr import Denoiser, NoiseLevel
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.denoiser import ddim_generate, ddim_invert, ddim_levels, inversion_error
from diffusers_repr.denoiser.family import Family
from diffusers_repr.noise import NoiseSchedule

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits-ddpm"
VP = NoiseSchedule.from_scheduler(DDIMScheduler())


class Formula(nn.Module):
    """A network that is a formula of input and timestep, and notes what it was told."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.told = formula, []

    def forward(self, sample, timestep):
        self.told.append(float(timestep.flatten()[0]))
        return (self.formula(sample, timestep.double().reshape(-1, 1, 1, 1)),)


def of(formula, schedule) -> Denoiser:
    return Denoiser(Formula(formula), schedule=schedule, family=Family({"in_channels": 1, "sample_size": 4}))


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> tuple[Denoiser, torch.Tensor]:
    denoiser = Denoiser.from_pretrained(DIGITS)
    denoiser.model.float()
    return denoiser, denoiser.pixels(load_digits_splits()["test"]["image"][:6])


def test_the_table_of_steps():
    """50 steps: evaluated at -1, 0, 20, ..., 960; counted from the noisiest, as Diffusion Hyperfeatures does."""
    denoiser = of(lambda x, t: 0 * x, VP)
    ddim_invert(denoiser, noise(), 50)
    told = denoiser.model.told
    table = {49: -1, 45: 60, 40: 160, 35: 260, 30: 360, 25: 460, 20: 560, 15: 660, 10: 760, 5: 860, 0: 960}
    assert {s: told[49 - s] for s in table} == table
    stock = DDIMScheduler()
    stock.set_timesteps(50)
    assert told[1:] + [980] == stock.timesteps.flip(0).tolist()
    assert [level.alpha for level in ddim_levels(VP, 50)[1:]] == pytest.approx(
        stock.alphas_cumprod[stock.timesteps.flip(0)].sqrt().tolist(), rel=1e-5
    )
    ddim_invert(denoiser, noise(), levels=ddim_levels(VP, 2, clean_timestep=0))
    assert denoiser.model.told[-2:] == [0, 0]


def test_without_noise_to_be_seen_the_image_is_scaled():
    """eps = 0: every step scales by sqrt(ab_next / ab), so that all of them scale by sqrt(ab of the last)."""
    x0, seen = noise(), []
    found = ddim_invert(of(lambda x, t: 0 * x, VP), x0, 10, callback=seen.append)
    ab = (1 - DDIMScheduler().betas.double()).cumprod(0)
    torch.testing.assert_close(found, ab[900].sqrt() * x0, rtol=1e-6, atol=0)
    assert [step.index for step in seen] == list(range(10))
    for step, before, after in zip(seen[1:], range(0, 900, 100), range(100, 1000, 100), strict=True):
        torch.testing.assert_close(step.state, (ab[after] / ab[before]).sqrt() * step.x_t, rtol=1e-6, atol=0)
        assert (step.level.timestep, step.after.timestep) == (before, after)
    assert seen[0].x_t.dtype == torch.float64
    torch.testing.assert_close(ddim_generate(of(lambda x, t: 0 * x, VP), found, 10), x0, rtol=1e-6, atol=0)


def test_both_ways_are_those_of_the_schedulers_of_diffusers(digits):
    """Their inverse scheduler is told where a step ends; the network is asked where it begins."""
    denoiser, images = digits
    config, steps, network = denoiser.scheduler.config, 5, denoiser.model
    options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading", "steps_offset": 0}
    up = DDIMInverseScheduler.from_config(config, **options)
    down = DDIMScheduler.from_config(config, **options)
    up.set_timesteps(steps)
    down.set_timesteps(steps)
    x = images
    with torch.no_grad():
        for source, target in zip([-1, *up.timesteps.tolist()], up.timesteps.tolist(), strict=False):
            x = up.step(network(x, source).sample, target, x).prev_sample
        torch.testing.assert_close(ddim_invert(denoiser, images, steps), x, rtol=1e-4, atol=1e-4)
        for t in down.timesteps:
            x = down.step(network(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(ddim_generate(denoiser, ddim_invert(denoiser, images, steps), steps), x,
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_the_error_falls_with_the_steps_and_is_gone_when_each_is_solved(digits):
    denoiser, images = digits
    before = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    denoiser.model.train()
    errors = [float(inversion_error(denoiser, images[:2], steps).mean()) for steps in (5, 10, 20)]
    assert all(fine < 0.7 * coarse for coarse, fine in zip(errors, errors[1:], strict=False)), errors
    solved = inversion_error(denoiser, images[:2], 10, refine=6)
    assert solved.shape == (2,)
    assert float(solved.mean()) < 0.05 * errors[1], (solved, errors)
    assert denoiser.model.training
    assert all(torch.equal(value, before[name]) for name, value in denoiser.model.state_dict().items())
    denoiser.model.eval()


def test_what_the_network_predicts_changes_nothing():
    """The same noise estimate, as eps and as v."""

    def eps(x, t):
        return 0.1 * x + 0.001 * t

    def v(x, t):
        ab = table[t.long().flatten()[0]] if t.flatten()[0] >= 0 else torch.ones((), dtype=torch.float64)
        return (eps(x, t) - (1 - ab).sqrt() * x) / ab.sqrt()

    table = VP.log_alpha_bar.exp()
    other = NoiseSchedule("vp", "v_prediction", 1000, VP.log_alpha_bar)
    states = [ddim_invert(of(net, schedule), noise(), 8) for net, schedule in ((eps, VP), (v, other))]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def test_of_a_flow_a_step_is_that_of_euler():
    """velocity = c x: (1 + c / N)^N x_0, and back from pure noise by (1 - c / N)."""
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    denoiser, x0 = of(lambda x, t: 0.5 * x, schedule), noise()
    there = ddim_invert(denoiser, x0, 4)
    torch.testing.assert_close(there, (1 + 0.5 / 4) ** 4 * x0, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ddim_generate(denoiser, there, 4), (1 - 1 / 64) ** 4 * x0, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="timestep 0 of a flow is the clean image"):
        ddim_levels(schedule, 4, clean_timestep=-1)


def test_of_edm_the_state_is_what_the_network_takes():
    """F = 0 is the best denoiser of Gaussian data, D = x d^2 / (d^2 + s^2): steps in sigma, written out."""
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0, sigma_data=0.5)
    schedule, d = NoiseSchedule.from_scheduler(scheduler), 0.5
    x0 = noise()
    levels = ddim_levels(schedule, 6)
    sigmas = [0.0, *(float(level.nsr) for level in levels[1:])]
    assert sigmas[1:] == pytest.approx(
        [(0.01 ** (1 / 7) + (20 ** (1 / 7) - 0.01 ** (1 / 7)) * n / 5) ** 7 for n in range(6)], rel=1e-5
    )
    x = x0.clone()
    for s, after in zip(sigmas, sigmas[1:], strict=False):
        denoised = x * d**2 / (d**2 + s**2)
        noisy = x * s / (d**2 + s**2)  # (x - D) / s
        x = denoised + after * noisy
    found = ddim_invert(of(lambda x, t: 0 * x, schedule), x0, 6)
    torch.testing.assert_close(found, x / (d**2 + sigmas[-1] ** 2) ** 0.5, rtol=1e-5, atol=1e-7)
    back = ddim_generate(of(lambda x, t: 0 * x, schedule), found, 6)
    for s, after in zip(sigmas[:0:-1], sigmas[-2::-1], strict=True):
        x = x * d**2 / (d**2 + s**2) + after * x * s / (d**2 + s**2)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-7)


def test_half_precision_keeps_the_state_wide(digits):
    denoiser, images = digits
    exact = ddim_invert(denoiser, images[:2], 10)
    seen = []
    try:
        denoiser.model.bfloat16()
        found = ddim_invert(denoiser, images[:2].bfloat16(), 10, callback=seen.append)
    finally:
        denoiser.model.float()
    assert found.dtype == seen[-1].x_t.dtype == torch.float32
    assert float((found - exact).abs().mean()) < 0.15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000; got 0"),
        ({"steps": 1001}, "from 1 to 1000; got 1001"),
        ({"levels": [NoiseLevel(timestep=5), NoiseLevel(timestep=4)]}, "from less to more noise"),
        ({"levels": [NoiseLevel(timestep=5)]}, "two levels at least; got 1"),
        ({"refine": -1}, "refine must be a whole number from 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        ddim_invert(of(lambda x, t: x, VP), noise(), **call)


def test_of_clean_images_a_network_that_predicts_them_tells_no_noise():
    denoiser = of(lambda x, t: 0 * x, NoiseSchedule("vp", "sample", 1000, VP.log_alpha_bar))
    with pytest.raises(ValueError, match="predicts clean images"):
        ddim_invert(denoiser, noise(), 5)
    ddim_invert(denoiser, noise(), levels=ddim_levels(denoiser.schedule, 5)[1:])
