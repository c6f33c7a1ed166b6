"""Conversions between eps, x0, v, velocity and score against the identities and the analytic Gaussian denoiser."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from diffusers_repr.noise import OUTPUTS, NoiseLevel, NoiseSchedule, Prediction, add_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "vp": NoiseSchedule.from_scheduler(DDPMScheduler(**SD)),
    "ve": NoiseSchedule.from_scheduler(ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)),
    "edm": NoiseSchedule.from_scheduler(EDMEulerScheduler()),
    "flow": NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler()),
}
FORMS = ("x0", "eps", "v", "velocity", "score")


def levels_of(schedule):
    low, high = schedule.timestep_range
    return [schedule.resolve(low + part * (high - low)) for part in (0.02, 0.3, 0.6, 0.97)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def output_of(kind, x0, eps, level, sigma_data):
    """What a perfect network of this kind returns, from the definitions."""
    a, s = level.alpha, level.sigma
    if kind in ("edm", "edm_v"):  # solve D = c_skip x + c_out F for F
        edm = s / a
        x = x0 + edm * eps
        c_skip = sigma_data**2 / (edm**2 + sigma_data**2)
        c_out = edm * sigma_data / math.sqrt(edm**2 + sigma_data**2)
        return (x0 - c_skip * x) / c_out * (1 if kind == "edm" else -1)
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a * eps - s * x0,
        "velocity": level.alpha_dot * x0 + level.sigma_dot * eps,
        "score": -eps / s,
    }[kind]


def with_output(schedule, kind):
    return NoiseSchedule(
        schedule.kind,
        kind,
        schedule.num_train_timesteps,
        schedule.log_alpha_bar,
        schedule.sigma_min,
        schedule.sigma_max,
        schedule.sigma_data,
    )


def cases():
    for process in SCHEDULES:
        for kind in OUTPUTS:
            if process == "edm" or not kind.startswith("edm"):
                yield process, kind


@pytest.mark.parametrize(("process", "kind"), list(cases()))
def test_every_form_from_every_output(process, kind):
    schedule = with_output(SCHEDULES[process], kind)
    for level in levels_of(schedule):
        x0, eps = draw(2, 2, 3, 4, 4).unbind()
        x_t = add_noise(x0, level, eps)
        predicted = Prediction(output_of(kind, x0, eps, level, schedule.sigma_data), x_t, level, schedule)
        a, s = level.alpha, level.sigma
        expected = {
            "x0": x0,
            "eps": eps,
            "v": a * eps - s * x0,
            "velocity": level.alpha_dot * x0 + level.sigma_dot * eps,
            "score": -eps / s,
        }
        for form in FORMS:
            found = getattr(predicted, form)
            assert found.dtype == torch.float64
            # dividing by alpha or sigma multiplies the rounding of x_t by as much
            scale = max(1.0, 1 / a, 1 / s) * max(1.0, float(expected[form].abs().max()))
            torch.testing.assert_close(found, expected[form], rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize(("process", "kind"), list(cases()))
def test_identities_hold_for_any_output(process, kind):
    """guidance_and_alignment.md E.1, for an output that is no perfect prediction."""
    schedule = with_output(SCHEDULES[process], kind)
    for level in levels_of(schedule)[1:3]:
        output, x_t = draw(2, 2, 3, 4, 4, seed=1).unbind()
        p = Prediction(output, x_t, level, schedule)
        a, s, da, ds = level.alpha, level.sigma, level.alpha_dot, level.sigma_dot
        n, delta = a * a + s * s, a * ds - da * s
        close = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(a * p.x0 + s * p.eps, x_t, **close)
        torch.testing.assert_close((x_t - s * p.eps) / a, p.x0, **close)
        torch.testing.assert_close((x_t - a * p.x0) / s, p.eps, **close)
        torch.testing.assert_close((a * x_t - s * p.v) / n, p.x0, **close)
        torch.testing.assert_close((s * x_t + a * p.v) / n, p.eps, **close)
        torch.testing.assert_close((ds * x_t - s * p.velocity) / delta, p.x0, **close)
        torch.testing.assert_close((a * p.velocity - da * x_t) / delta, p.eps, **close)
        torch.testing.assert_close((x_t + s * s * p.score) / a, p.x0, **close)
        torch.testing.assert_close(da / a * x_t + delta / a * p.eps, p.velocity, **close)
        torch.testing.assert_close(ds / s * x_t - delta / s * p.x0, p.velocity, **close)


@pytest.mark.parametrize(("process", "kind"), list(cases()))
def test_analytic_gaussian_denoiser(process, kind):
    """Data N(mu, s^2): guidance_and_alignment.md E.5."""
    schedule, mu, std = with_output(SCHEDULES[process], kind), 0.3, 0.7
    for level in levels_of(schedule):
        a, s = level.alpha, level.sigma
        x_t = draw(5, 1, seed=2) * math.sqrt(a * a * std * std + s * s) + a * mu
        variance = a * a * std * std + s * s
        mean = mu + a * std * std * (x_t - a * mu) / variance
        noise = s * (x_t - a * mu) / variance
        p = Prediction(output_of(kind, mean, noise, level, schedule.sigma_data), x_t, level, schedule)
        tight = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(p.x0, mean, **tight)
        torch.testing.assert_close(p.eps, noise, **tight)
        torch.testing.assert_close(p.score, -(x_t - a * mu) / variance, **tight)
        torch.testing.assert_close(p.velocity, level.alpha_dot * mean + level.sigma_dot * noise, **tight)


@pytest.mark.parametrize("process", SCHEDULES)
def test_score_is_the_gradient_of_the_log_density(process):
    schedule, mu, std = SCHEDULES[process], 0.3, 0.7
    for level in levels_of(schedule):
        a, s = level.alpha, level.sigma
        x_t = draw(5, 1, seed=3).requires_grad_()
        variance = a * a * std * std + s * s
        log_density = -((x_t - a * mu) ** 2) / (2 * variance)
        (gradient,) = torch.autograd.grad(log_density.sum(), x_t)
        mean = mu + a * std * std * (x_t - a * mu) / variance
        noise = s * (x_t - a * mu) / variance
        output = output_of(schedule.output, mean, noise, level, schedule.sigma_data)
        found = Prediction(output, x_t, level, schedule).score
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", SCHEDULES)
def test_derivatives_are_finite_differences(process):
    schedule = SCHEDULES[process]
    low, high = schedule.timestep_range
    unit = {"vp": 1000, "flow": 1000, "ve": schedule.sigma_max, "edm": schedule.sigma_max}[process]
    for part in (0.05, 0.3, 0.6, 0.95):
        time = low + part * (high - low)
        if process == "vp":  # the process itself is known at whole timesteps only
            time, before, after = round(time), round(time) - 1, round(time) + 1
            span = 2 / unit
        elif process == "edm":  # unit time is sigma / sigma_max, the timestep its logarithm
            before, after = time - 1e-6, time + 1e-6
            span = (math.exp(4 * after) - math.exp(4 * before)) / unit
        else:
            before, after = time - 1e-3, time + 1e-3
            span = 2e-3 / unit
        at, left, right = (schedule.resolve(t) for t in (time, before, after))
        tolerance = 2e-3 if process == "vp" else 1e-6
        for name in ("alpha", "sigma"):
            slope = (getattr(right, name) - getattr(left, name)) / span
            assert getattr(at, f"{name}_dot") == pytest.approx(slope, rel=tolerance, abs=1e-9)


def test_derivatives_of_a_variance_preserving_process_follow_its_betas():
    scheduler = DDPMScheduler(**SD)
    schedule = SCHEDULES["vp"]
    for t in (0, 1, 5, 261, 500, 998):
        level = schedule.resolve(t)
        # alpha_dot = -beta(t) alpha / 2 with beta per unit time, between the betas of the steps on both sides
        lo, hi = sorted(-math.log1p(-float(scheduler.betas[i])) * 1000 for i in (t, min(t + 1, 999)))
        rate = -2 * level.alpha_dot / level.alpha
        assert lo * (1 - 1e-9) <= rate <= hi * (1 + 1e-9)
        assert level.alpha * level.alpha_dot + level.sigma * level.sigma_dot == pytest.approx(0, abs=1e-12)
        between = schedule.resolve(t + 0.5)
        slope = (schedule.resolve(t + 0.5 + 1e-4).alpha - schedule.resolve(t + 0.5 - 1e-4).alpha) / 2e-7
        assert between.alpha_dot == pytest.approx(slope, rel=1e-6)


# EDM


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_equals_precondition_outputs(cls, predicts, sigma_data):
    scheduler = cls(sigma_data=sigma_data, prediction_type=predicts)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for edm in (0.002, 0.1, 0.5, 3.0, 80.0):
        level = schedule.resolve(NoiseLevel(nsr=edm))
        sample, output = draw(2, 2, 3, 4, 4, seed=4).unbind()
        sigma = torch.tensor(edm, dtype=torch.float64)
        denoised = scheduler.precondition_outputs(sample, output, sigma)
        p = Prediction(output, scheduler.precondition_inputs(sample, sigma), level, schedule)
        torch.testing.assert_close(p.x0, denoised, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.eps, (sample - denoised) / edm, rtol=1e-9, atol=1e-9 / edm)


def test_edm_output_is_minus_v_of_the_unit_data():
    """F = -v with alpha = sigma_d / sqrt(sigma^2 + sigma_d^2) and data divided by sigma_d."""
    schedule = SCHEDULES["edm"]
    d = schedule.sigma_data
    for level in levels_of(schedule):
        x0, eps = draw(2, 2, 3, seed=5).unbind()
        a = d / math.hypot(level.nsr, d)
        s = level.nsr / math.hypot(level.nsr, d)
        minus_v = -(a * eps - s * x0 / d)
        torch.testing.assert_close(output_of("edm", x0, eps, level, d), minus_v, rtol=1e-10, atol=1e-10)
        p = Prediction(minus_v, add_noise(x0, level, eps), level, schedule)
        torch.testing.assert_close(p.x0, x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.eps, eps, rtol=1e-12, atol=1e-12)


def test_edm_noise_estimate_does_not_cancel_at_small_sigma():
    schedule = SCHEDULES["edm"]
    level = schedule.resolve(NoiseLevel(nsr=0.002))
    x0, eps = draw(2, 64, seed=6).unbind()
    output = output_of("edm", x0, eps, level, schedule.sigma_data)
    p = Prediction(output.float(), add_noise(x0, level, eps).float(), level, schedule)
    torch.testing.assert_close(p.eps.double(), eps, rtol=1e-5, atol=1e-5)


# diffusers' own


def test_v_equals_the_schedulers_velocity():
    scheduler = DDPMScheduler(**SD, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for t in (5, 261, 900):
        x0, eps = draw(2, 2, 3, 4, 4).unbind()
        v = scheduler.get_velocity(x0, eps, torch.tensor([t, t]))
        level = schedule.resolve(t)
        torch.testing.assert_close(output_of("v_prediction", x0, eps, level, 1.0), v, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(Prediction(v, add_noise(x0, level, eps), level, schedule).x0, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_x0_equals_what_ddim_steps_from(predicts):
    scheduler = DDIMScheduler(**SD, prediction_type=predicts, clip_sample=False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    output, x_t = draw(2, 1, 3, 4, 4).unbind()
    for t in scheduler.timesteps[1::3]:
        theirs = scheduler.step(output, t, x_t).pred_original_sample
        ours = Prediction(output, x_t, schedule.resolve(int(t)), schedule).x0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_flow_velocity_is_noise_minus_data():
    schedule = SCHEDULES["flow"]
    x0, eps = draw(2, 1, 3, 4, 4).unbind()
    for t in (0, 300, 1000):
        level = schedule.resolve(t)
        p = Prediction(eps - x0, add_noise(x0, level, eps), level, schedule)
        torch.testing.assert_close(p.x0, x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.eps, eps, rtol=1e-12, atol=1e-12)
        assert torch.equal(p.velocity, p.output)


# Ends


def test_no_signal_left_raises_for_x0_from_noise_only():
    zero_snr = DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    flow = SCHEDULES["flow"]
    x0, eps = draw(2, 1, 3, 2, 2).unbind()
    for schedule in (NoiseSchedule.from_scheduler(zero_snr), flow):
        level = schedule.resolve(schedule.timestep_range[1])
        assert level.alpha == 0
        for kind in ("epsilon", "score"):
            p = Prediction(output_of(kind, x0, eps, level, 1.0), eps, level, with_output(schedule, kind))
            torch.testing.assert_close(p.eps, eps)
            for form in ("x0", "v", "velocity"):
                with pytest.raises(ValueError, match="x0 is undefined where alpha = 0"):
                    getattr(p, form)
        for kind in ("v_prediction", "velocity", "sample"):
            p = Prediction(output_of(kind, x0, eps, level, 1.0), eps, level, with_output(schedule, kind))
            torch.testing.assert_close(p.x0, x0)
            torch.testing.assert_close(p.eps, eps)
            torch.testing.assert_close(p.v, -x0)
            velocity = level.alpha_dot * x0 + level.sigma_dot * eps
            assert velocity.isfinite().all()
            torch.testing.assert_close(p.velocity, velocity)


def test_no_noise_left_raises_for_eps_from_data_only():
    schedule = with_output(SCHEDULES["flow"], "sample")
    p = Prediction(draw(1, 2), draw(1, 2), schedule.resolve(0), schedule)
    with pytest.raises(ValueError, match="eps is undefined where sigma = 0"):
        _ = p.eps
    flow = Prediction(draw(1, 2), draw(1, 2), SCHEDULES["flow"].resolve(0), SCHEDULES["flow"])
    with pytest.raises(ValueError, match="score is undefined where sigma = 0"):
        _ = flow.score


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_one_level_per_sample_equals_one_by_one(process, form):
    schedule = SCHEDULES[process]
    singles = levels_of(schedule)
    many = schedule.resolve(torch.tensor([level.timestep for level in singles], dtype=torch.float64))
    output, x_t = draw(2, 4, 3, 2, 2).unbind()
    found = getattr(Prediction(output, x_t, many, schedule), form)
    for row, level in enumerate(singles):
        alone = getattr(Prediction(output[row : row + 1], x_t[row : row + 1], level, schedule), form)[0]
        scale = max(1.0, float(alone.abs().max()))
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5 * scale)


def test_half_precision_is_converted_in_float32():
    level = SCHEDULES["vp"].resolve(261)
    p = Prediction(draw(1, 2).half(), draw(1, 2).bfloat16(), level, SCHEDULES["vp"])
    assert {getattr(p, form).dtype for form in FORMS} == {torch.float32}


def test_a_level_by_hand_without_derivatives_is_told_so():
    level = NoiseLevel(timestep=261, alpha=0.8, sigma=0.6)
    p = Prediction(draw(1, 2), draw(1, 2), level, SCHEDULES["vp"])
    assert p.v.isfinite().all()
    with pytest.raises(ValueError, match="lacks alpha_dot"):
        _ = p.velocity
