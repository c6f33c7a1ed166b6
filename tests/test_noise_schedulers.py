"""Every diffusers scheduler with a noise process: its levels are what its network is fed."""

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, IPNDMScheduler, ScoreSdeVeScheduler

from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]
EDM = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
SOLVERS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
]


def make(name, **config):
    cls = getattr(diffusers, name, None)
    if cls is None:  # not among the top-level names
        cls = getattr(diffusers.schedulers, name)
    return cls(**config)


def schedule_of(scheduler):
    return NoiseSchedule.from_scheduler(scheduler)


@pytest.mark.parametrize("name", [*VP, *FLOW, *EDM, "ScoreSdeVeScheduler"])
def test_a_larger_timestep_is_noisier(name):
    schedule = schedule_of(make(name))
    times = torch.linspace(*schedule.timestep_range, 97, dtype=torch.float64).tolist()
    levels = [schedule.resolve(t) for t in times]
    assert all(a < b for a, b in zip(levels, levels[1:], strict=False))
    assert all(a.half_log_snr > b.half_log_snr for a, b in zip(levels, levels[1:], strict=False))
    assert schedule.kind == ("vp" if name in VP else "flow" if name in FLOW else "edm" if name in EDM else "ve")


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ],
)
def test_coefficients_are_those_of_the_schedulers_add_noise(name):
    scheduler = make(name)
    schedule = schedule_of(scheduler)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in (20, 261, 500, 900, 999):
        level, at = schedule.resolve(t), torch.tensor([t])
        assert level.alpha == pytest.approx(float(scheduler.add_noise(one, zero, at)), rel=5e-5)
        assert level.sigma == pytest.approx(float(scheduler.add_noise(zero, one, at)), rel=5e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_multistep_solvers_hold_the_same_variance_preserving_state(name):
    scheduler = make(name, **SD)
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(999)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in scheduler.timesteps[[100, 500, 900]]:
        level = schedule.resolve(float(t))
        assert level.alpha == pytest.approx(float(scheduler.add_noise(one, zero, t[None])), rel=1e-3)
        assert level.sigma == pytest.approx(float(scheduler.add_noise(zero, one, t[None])), rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
    ],
)
def test_euler_type_schedulers_are_read_in_the_form_the_network_takes(name):
    scheduler = make(name, **SD)
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(1000)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in (999.0, 500.0, 21.0):
        at = torch.tensor([t], dtype=scheduler.timesteps.dtype)
        sigma = float(scheduler.add_noise(zero, one, at))  # the state x_0 + sigma eps
        level = schedule.resolve(t)
        assert level.nsr == pytest.approx(sigma, rel=1e-4)
        assert level.alpha == pytest.approx(1 / (1 + sigma**2) ** 0.5, rel=1e-4)
        scheduler._step_index = None
        assert level.alpha == pytest.approx(float(scheduler.scale_model_input(one, at[0])), rel=1e-3)


@pytest.mark.parametrize("name", FLOW)
def test_flow_models_never_get_the_samplers_shift(name):
    plain = make(name)
    plain.set_timesteps(20)
    schedule = schedule_of(make(name, shift=7.0))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for t in plain.timesteps[:-1]:
        level = schedule.resolve(float(t))
        plain._step_index = None  # the Heun scheduler keeps its first answer
        assert level.alpha == pytest.approx(float(plain.scale_noise(one, t[None], zero)), abs=1e-6)
        assert level.sigma == pytest.approx(float(plain.scale_noise(zero, t[None], one)), abs=1e-6)
    assert (schedule.resolve(250).alpha, schedule.resolve(250).sigma) == (0.75, 0.25)


@pytest.mark.parametrize("name", SOLVERS[:4])
@pytest.mark.parametrize(("predicts", "output"), [("flow_prediction", "velocity"), ("epsilon", "epsilon")])
def test_multistep_solvers_on_flow_models(name, predicts, output):
    schedule = schedule_of(make(name, use_flow_sigmas=True, prediction_type=predicts, flow_shift=3.0))
    assert (schedule.kind, schedule.output) == ("flow", output)
    assert schedule.resolve(500).nsr == 1.0


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_levels_are_what_the_scheduler_feeds_the_network(name, sigma_data):
    scheduler = make(name, sigma_data=sigma_data)
    schedule = schedule_of(scheduler)
    x0, eps = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for edm in (0.002, 0.05, 1.0, 17.0, 80.0):
        timestep = scheduler.precondition_noise(torch.tensor(edm, dtype=torch.float64))
        fed = scheduler.precondition_inputs(x0 + edm * eps, torch.tensor(edm, dtype=torch.float64))
        level = schedule.resolve(float(timestep))
        assert level.nsr == pytest.approx(edm, rel=1e-12)
        torch.testing.assert_close(add_noise(x0, level, eps), fed, rtol=1e-12, atol=1e-12)
        assert schedule.resolve(NoiseLevel(nsr=edm)).timestep == pytest.approx(float(timestep), abs=1e-12)


def test_continuous_euler_tells_the_network_a_quarter_of_log_sigma():
    scheduler = EulerDiscreteScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(10)
    schedule = schedule_of(scheduler)
    assert (schedule.kind, schedule.output) == ("edm", "edm_v")
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        level = schedule.resolve(float(t))
        assert level.nsr == pytest.approx(float(sigma), rel=1e-5)
        assert level.alpha == pytest.approx(1 / (float(sigma) ** 2 + 1) ** 0.5, rel=1e-5)


def test_variance_exploding_levels_are_sigmas():
    scheduler = ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_sigmas(10)
    schedule = schedule_of(scheduler)
    x0, eps = torch.randn(2, 1, 3, 2, 2).unbind()
    for at in range(10):
        sigma = float(scheduler.discrete_sigmas[at])
        ours = add_noise(x0, schedule.resolve(sigma), eps)
        torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, torch.tensor([at])))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (IPNDMScheduler(), "IPNDMScheduler has no betas"),
        (make("SCMScheduler"), "prediction_type='trigflow'"),
        (make("CMStochasticIterativeScheduler"), "schedule=NoiseSchedule"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "larger must be noisier"),
    ],
)
def test_schedulers_without_a_process_we_know_are_refused(scheduler, message):
    with pytest.raises((TypeError, ValueError), match=message):
        schedule_of(scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vb", "epsilon"), "kind is one of vp"),
        (("vp", "eps"), "output is one of epsilon"),
        (("vp", "epsilon"), "needs log_alpha_bar"),
        (("edm", "edm"), "sigma_min < sigma_max"),
    ],
)
def test_a_schedule_made_by_hand_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(*arguments)
