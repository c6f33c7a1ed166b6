"""Noise levels: exactness at small t, order, transfer between units and models, bad input."""

import pickle
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ScoreSdeVeScheduler,
)

from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule_of(scheduler):
    return NoiseSchedule.from_scheduler(scheduler)


def exact(betas, timesteps):
    """(alpha, sigma) by a product in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        product, found = Decimal(1), []
        for t, beta in enumerate(betas.tolist()):
            product *= 1 - Decimal(beta)
            if t in timesteps:
                found.append((float(product.sqrt()), float((1 - product).sqrt())))
    return found


# Exactness


BETAS = {
    "linear": LINEAR,
    "scaled_linear": SD,
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {**SD, "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": np.geomspace(1e-5, 0.05, 300).tolist()},
}


@pytest.mark.parametrize("config", BETAS)
def test_alpha_and_sigma_are_exact_at_every_size_of_t(config):
    scheduler = DDIMScheduler(**BETAS[config])
    schedule, last = schedule_of(scheduler), len(scheduler.betas) - 1
    timesteps = (0, 1, 5, 50, 261, last)
    for t, (alpha, sigma) in zip(timesteps, exact(scheduler.betas, timesteps), strict=True):
        level = schedule.resolve(t)
        assert level.alpha == pytest.approx(alpha, rel=1e-12, abs=0)
        assert level.sigma == pytest.approx(sigma, rel=1e-12, abs=0)
        many = schedule.resolve(torch.tensor([t]))
        assert many.alpha.dtype == many.sigma.dtype == torch.float32
        assert many.sigma.item() == np.float32(sigma)
    if config == "zero_snr":
        level = schedule.resolve(last)
        assert (level.alpha, level.sigma, level.nsr) == (0.0, 1.0, float("inf"))


def test_zero_terminal_snr_of_samplers_that_replace_the_last_alpha():
    for cls in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler):
        level = schedule_of(cls(**SD, rescale_betas_zero_snr=True)).resolve(999)
        assert level.alpha == 0.0


def test_shifted_table_of_cogvideox_is_kept():
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    schedule = schedule_of(scheduler)
    held = scheduler.alphas_cumprod[[0, 300, 998]].sqrt().tolist()
    assert [schedule.resolve(t).alpha for t in (0, 300, 998)] == pytest.approx(held, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "dtype", "t", "off"),
    [
        (SD, torch.float16, 0, 0.072),
        (SD, torch.float16, 1, -0.073),
        (SD, torch.float16, 5, 0.021),
        (SD, torch.bfloat16, 0, -1.0),
        (SD, torch.bfloat16, 1, -1.0),
        (SD, torch.bfloat16, 5, -0.13),
        (LINEAR, torch.float16, 0, -1.0),
        (LINEAR, torch.float16, 1, -1.0),
        (LINEAR, torch.float16, 5, 0.043),
        (LINEAR, torch.bfloat16, 0, -1.0),
        (LINEAR, torch.bfloat16, 1, -1.0),
        (LINEAR, torch.bfloat16, 5, -1.0),
    ],
)
def test_half_precision_at_small_t_is_right_where_diffusers_is_off(config, dtype, t, off):
    scheduler = DDPMScheduler(**config)
    ((alpha, sigma),) = exact(scheduler.betas, (t,))
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    level = schedule_of(scheduler).resolve(t)
    assert add_noise(zero, level, one).item() == torch.tensor(sigma, dtype=dtype).item()
    assert add_noise(one, level, zero).item() == torch.tensor(alpha, dtype=dtype).item()
    theirs = scheduler.add_noise(zero, one, torch.tensor([t])).item()
    assert theirs / sigma - 1 == pytest.approx(off, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise_rounds_once_per_sample_too(dtype):
    schedule = schedule_of(DDPMScheduler(**SD))
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    out = add_noise(x0, schedule.resolve(torch.tensor([0, 261, 999])), eps)
    for row, t in enumerate((0, 261, 999)):
        level = schedule.resolve(t)
        wide = level.alpha * x0[row].double() + level.sigma * eps[row].double()
        bound = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(out[row].double(), wide, rtol=bound, atol=2 * bound)
    assert out.dtype == dtype


# Transfer between units


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, ScoreSdeVeScheduler]
)
def test_nsr_and_half_log_snr_find_the_timestep_again(scheduler):
    schedule = schedule_of(scheduler())
    low, high = schedule.timestep_range
    for part in (0.0, 0.0005, 0.01, 0.2613, 0.5, 0.77, 0.999, 1.0):
        level = schedule.resolve(low + part * (high - low))
        for again in (NoiseLevel(nsr=level.nsr), NoiseLevel(half_log_snr=level.half_log_snr)):
            back = schedule.resolve(again)
            assert back.timestep == pytest.approx(level.timestep, rel=1e-9, abs=1e-7)
            assert back.nsr == pytest.approx(level.nsr, rel=1e-9)


def test_published_noise_to_signal_ratios():
    for config, pairs in (
        (LINEAR, {10: 0.047, 50: 0.176, 101: 0.346, 150: 0.522, 300: 1.240}),
        (SD, {0: 0.029, 51: 0.228, 100: 0.344, 261: 0.725, 299: 0.830}),
    ):
        schedule = schedule_of(DDPMScheduler(**config))
        for t, nsr in pairs.items():
            assert schedule.resolve(t).nsr == pytest.approx(nsr, abs=5e-4)


def test_nsr_inside_the_last_interval_of_zero_terminal_snr():
    schedule = schedule_of(DDIMScheduler(**SD, rescale_betas_zero_snr=True))
    before = schedule.resolve(998).nsr
    for nsr in (before, 2 * before, 1e6, float("inf")):
        level = schedule.resolve(NoiseLevel(nsr=nsr))
        assert level.nsr == pytest.approx(nsr, rel=1e-9)
        assert 998 <= level.timestep <= 999
    halfway = schedule.resolve(998.5)
    assert 0 < halfway.alpha < schedule.resolve(998).alpha


def test_fractional_timesteps_lie_between():
    schedule = schedule_of(DDPMScheduler(**LINEAR))
    for t in (0, 1, 500, 998):
        low, mid, high = (schedule.resolve(t + part) for part in (0.0, 0.4, 1.0))
        assert low < mid < high
        assert mid.alpha**2 + mid.sigma**2 == pytest.approx(1, abs=1e-14)
    assert schedule.resolve(500.0).alpha == schedule.resolve(500).alpha


def test_one_level_per_sample():
    schedule = schedule_of(DDPMScheduler(**SD))
    times = torch.tensor([0, 261, 999])
    level = schedule.resolve(times)
    single = [schedule.resolve(int(t)) for t in times]
    for name in ("timestep", "nsr", "half_log_snr", "alpha", "sigma", "alpha_dot", "sigma_dot"):
        values = getattr(level, name)
        assert values.shape == (3,)
        assert values.tolist() == pytest.approx([getattr(one, name) for one in single], rel=1e-6)
    again = schedule.resolve(NoiseLevel(nsr=level.nsr))
    assert again.timestep.tolist() == pytest.approx(times.tolist(), abs=1e-2)
    with pytest.raises(ValueError, match="no single place"):
        max(level, level)
    with pytest.raises(ValueError, match="3 noise levels for a batch of 2"):
        add_noise(torch.zeros(2, 1), level, torch.zeros(2, 1))


def test_order():
    schedule = schedule_of(DDPMScheduler(**SD))
    levels = [NoiseLevel(nsr=2.0), NoiseLevel(half_log_snr=0.0), schedule.resolve(261), NoiseLevel(nsr=0)]
    assert [round(level._order(), 3) for level in sorted(levels)] == [0.0, 0.725, 1.0, 2.0]
    assert levels[0] > levels[1] >= levels[2] > levels[3]
    assert levels[3] <= levels[3]
    with pytest.raises(ValueError, match="only under a schedule"):
        _ = NoiseLevel(timestep=3) < levels[0]
    with pytest.raises(TypeError):
        _ = levels[0] < 3


def test_pure_noise_and_clean_ends_of_a_flow():
    schedule = schedule_of(FlowMatchEulerDiscreteScheduler())
    clean, pure = schedule.resolve(0), schedule.resolve(1000)
    assert (clean.alpha, clean.sigma, clean.nsr, clean.half_log_snr) == (1, 0, 0, float("inf"))
    assert (pure.alpha, pure.sigma, pure.nsr, pure.half_log_snr) == (0, 1, float("inf"), -float("inf"))
    assert schedule.resolve(NoiseLevel(nsr=0)).timestep == 0
    assert schedule.resolve(NoiseLevel(nsr=float("inf"))).timestep == 1000
    assert schedule.resolve(NoiseLevel(half_log_snr=-float("inf"))).timestep == 1000


def test_a_level_resolved_for_another_process_is_refused():
    vp, flow = schedule_of(DDPMScheduler(**SD)), schedule_of(FlowMatchEulerDiscreteScheduler())
    level = vp.resolve(261)
    with pytest.raises(ValueError, match=r"another noise process \(vp\).*NoiseLevel\(nsr=0\.72"):
        flow.resolve(level)
    with pytest.raises(ValueError, match="another noise process"):
        schedule_of(DDPMScheduler(**LINEAR)).resolve(level)
    assert flow.resolve(NoiseLevel(nsr=level.nsr)).nsr == pytest.approx(level.nsr)
    # an equal process, another output; a pickled level; a level put together by hand
    other = schedule_of(DDIMScheduler(**SD, prediction_type="v_prediction"))
    assert other.resolve(level) is level
    assert other.resolve(pickle.loads(pickle.dumps(level))).alpha == level.alpha
    by_hand = NoiseLevel(timestep=261, alpha=0.8, sigma=0.6)
    assert flow.resolve(by_hand) is by_hand


# Bad input


@pytest.mark.parametrize("value", [True, "261", [261], 3j, Decimal(3), np.bool_(True)])
def test_levels_of_the_wrong_kind(value):
    with pytest.raises(TypeError, match="timestep must be a number"):
        schedule_of(DDPMScheduler()).resolve(value)


@pytest.mark.parametrize(
    "value",
    [261, 261.0, np.int64(261), np.float32(261), Fraction(261), torch.tensor(261), torch.tensor(261.0).half()],
)
def test_numbers_of_any_library(value):
    level = schedule_of(DDPMScheduler()).resolve(value)
    assert isinstance(level.alpha, float)
    assert level.timestep == 261
    assert schedule_of(DDPMScheduler()).resolve(0.1).timestep == 0.1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"timestep": -1}, r"timestep -1 is outside \[0, 999\].*larger is noisier"),
        ({"timestep": 1000}, "outside"),
        ({"timestep": torch.tensor([5, 1000])}, r"\[5, 1000\] is outside"),
        ({"nsr": 0}, r"nsr 0 is outside \[0\.01\d*, 157"),
        ({"nsr": 1e4}, r"nsr 10000\.0 is outside"),
        ({"half_log_snr": 9.0}, r"half_log_snr 9\.0 is outside \[-5\.\d+, 4\.6\d*\].*smaller is noisier"),
        ({"timestep": float("nan")}, "must be finite"),
        ({"timestep": float("inf")}, "must be finite"),
        ({"nsr": float("nan")}, "must be finite"),
        ({"nsr": -0.5}, "at least 0"),
        ({"nsr": torch.tensor([-0.5])}, "at least 0"),
        ({"timestep": torch.tensor([True])}, "number or a tensor"),
        ({"timestep": torch.zeros(0)}, "number or a tensor"),
        ({"timestep": torch.zeros(2, 2)}, r"got a tensor \(2, 2\)"),
        ({"timestep": 3, "nsr": 1.0}, "exactly one"),
        ({}, "got none"),
        ({"alpha": 1.0, "timestep": 3}, "both alpha and sigma"),
    ],
)
def test_levels_out_of_range_or_not_numbers(request_, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(DDPMScheduler()).resolve(NoiseLevel(**request_))


def test_edm_timesteps_are_told_by_their_range():
    with pytest.raises(ValueError, match=r"timestep 261 is outside \[-1\.55\d*, 1\.09\d*\], .* edm schedule"):
        schedule_of(EDMEulerScheduler()).resolve(261)


def test_add_noise_checks_its_input():
    level = schedule_of(DDPMScheduler()).resolve(5)
    with pytest.raises(ValueError, match="must be equal"):
        add_noise(torch.zeros(1, 2), level, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="floating dtype; got torch.uint8"):
        add_noise(torch.zeros(1, 2, dtype=torch.uint8), level, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not resolved"):
        add_noise(torch.zeros(1, 2), NoiseLevel(timestep=5), torch.zeros(1, 2))
