"""The level at which a sampler stands, against the sampler's own numbers and against runs with a known answer."""

import copy
import functools
import importlib
import importlib.util
import sys
import types

import diffusers
import pytest
import torch

from diffusers_repr.noise import (
    OUTPUTS,
    NoiseLevel,
    NoiseSchedule,
    Prediction,
    eps_shift_to_output,
    output_difference,
    sampler_level,
    to_x0_eps,
)

# Two cases are what it asks users to leave.
pytestmark = pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver and sde-dpmsolver. is deprecated")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CONTINUOUS = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
STOCHASTIC = ("DDPM", "Ancestral", "SDE", "LCM", "SASolver", "Cosine")
CASES = [
    ("DDIMScheduler", SD),
    ("DDIMScheduler", {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {**SD, "prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("DDIMParallelScheduler", SD),
    ("DDPMScheduler", {}),
    ("DDPMParallelScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", SD),
    ("LCMScheduler", SD),
    ("TCDScheduler", SD),
    ("LMSDiscreteScheduler", SD),
    ("LMSDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {**SD, "use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {**SD, **CONTINUOUS, "use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", {**SD, "use_karras_sigmas": True, "prediction_type": "sample"}),
    ("KDPM2DiscreteScheduler", SD),
    ("KDPM2DiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", SD),
    ("KDPM2AncestralDiscreteScheduler", {**SD, "use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("DPMSolverSDEScheduler", SD),
    ("DPMSolverSDEScheduler", {**SD, "use_karras_sigmas": True}),
    (MULTISTEP, SD),
    (MULTISTEP, {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (MULTISTEP, {**SD, "algorithm_type": "sde-dpmsolver++"}),
    (MULTISTEP, {**SD, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    (MULTISTEP, {**SD, "use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    (MULTISTEP, {**SD, "use_exponential_sigmas": True, "solver_order": 3}),
    (MULTISTEP, {**SD, "use_beta_sigmas": True}),
    (MULTISTEP, {**SD, "use_lu_lambdas": True}),
    (MULTISTEP, {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    (MULTISTEP, FLOW),
    (SINGLESTEP, SD),
    (SINGLESTEP, {**SD, "solver_order": 3, "use_karras_sigmas": True}),
    (SINGLESTEP, FLOW),
    ("DEISMultistepScheduler", SD),
    ("DEISMultistepScheduler", {**SD, "use_karras_sigmas": True}),
    ("DEISMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", {**SD, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", FLOW),
    ("SASolverScheduler", SD),
    ("SASolverScheduler", {**SD, "use_karras_sigmas": True}),
    ("SASolverScheduler", FLOW),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"sigma_data": 1.3, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.7}),
    ("CosineDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("IPNDMScheduler", {}),
]
IDS = [
    "-".join([name.removesuffix("Scheduler"), *(str(v) for k, v in config.items() if SD.get(k) != v), str(at)])
    for at, (name, config) in enumerate(CASES)
]
CLEAN = torch.tensor([[0.3, -0.6, 0.8]], dtype=torch.float64)
NOISE = torch.tensor([[-0.9, 1.7, 0.4]], dtype=torch.float64)


def make(name, config):
    """The scheduler and what its network was trained on."""
    module = {
        "DPMSolverSDEScheduler": "diffusers.schedulers.scheduling_dpmsolver_sde",
        "CosineDPMSolverMultistepScheduler": "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep",
    }.get(name, "diffusers")
    scheduler = getattr(importlib.import_module(module), name)(**config)
    if name.startswith("Cosine"):
        return scheduler, NoiseSchedule("edm", "edm_v", sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
    if name == "IPNDMScheduler":
        angles = torch.linspace(0.001, 1, 1000, dtype=torch.float64) * torch.pi / 2
        betas = angles.sin() ** 2
        return scheduler, NoiseSchedule("vp", "v_prediction", 1000, torch.log1p(-(betas**2)))
    return scheduler, NoiseSchedule.from_scheduler(scheduler)


@pytest.fixture(autouse=True)
def _torchsde(monkeypatch):
    """Two modules import torchsde for their noise, which these tests give by hand."""
    if importlib.util.find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))


def start(scheduler, steps=8):
    more = {"mu": 0.9} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **more)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.randn_like(CLEAN)
    return scheduler.timesteps


def probe_state(scheduler, t):
    """alpha and sigma of the sampler's state, by its own noising of constants (float32 tables)."""
    scheduler, one, zero = copy.deepcopy(scheduler), torch.ones(1, dtype=torch.float64), torch.zeros(1).double()
    name = type(scheduler).__name__
    if name == "IPNDMScheduler":  # its noise estimate, sigma x + alpha v
        index = scheduler.index_for_timestep(t)
        return float(scheduler.alphas[index]), float(scheduler.betas[index])
    if name == "SASolverScheduler":  # noises at the timestep, which Karras sigmas round; x_0 = (x - sigma eps) / alpha
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        scheduler.register_to_config(prediction_type="epsilon")
        alpha = 1 / float(scheduler.convert_model_output(zero, sample=one))
        return alpha, -alpha * float(scheduler.convert_model_output(one, sample=zero))
    if hasattr(scheduler, "scale_noise"):
        return tuple(float(scheduler.scale_noise(a, t[None], b)) for a, b in ((one, zero), (zero, one)))
    if hasattr(scheduler, "step_index") and scheduler.step_index is not None:
        scheduler._begin_index = scheduler.begin_index or 0  # noise at the step, as inpainting does
    return tuple(float(scheduler.add_noise(a, b, t[None])) for a, b in ((one, zero), (zero, one)))


def probe_scale(scheduler, t):
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(copy.deepcopy(scheduler).scale_model_input(torch.ones(1, dtype=torch.float64), t))


def network(kind, x, level, sigma_data):
    """The network of data that is CLEAN always: linear in its input."""
    a, s = level.alpha, level.sigma
    noise = (x - a * CLEAN) / s
    return {
        "epsilon": noise,
        "sample": CLEAN,
        "v_prediction": a * noise - s * CLEAN,
        "velocity": noise - CLEAN,
        "edm": (s * x - noise) / (sigma_data * a),
        "edm_v": -(s * x - noise) / (sigma_data * a),
    }[kind]


def frozen(scheduler):
    return {k: (v.clone() if isinstance(v, torch.Tensor) else copy.copy(v)) for k, v in vars(scheduler).items()}


def assert_unchanged(scheduler, before):
    assert vars(scheduler).keys() == before.keys()
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
        elif key not in ("model_outputs", "ets", "derivatives"):
            same = value is before[key] or value == before[key]
            assert same if isinstance(same, bool) else same.all(), key


def walk(scheduler, schedule, times, seed=0):
    """Sample from the first of `times` on; each network call's time, sampler state, input, reading and step output."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    first = sampler_level(scheduler, times[0], schedule)
    state = (first.level.alpha * CLEAN + first.level.sigma * NOISE) / first.scale
    name = type(scheduler).__name__
    options = {"eta": 0.0} if name == "TCDScheduler" else {}
    if any(word in name for word in ("DDPM", "LCM", "Ancestral")):
        options["generator"] = generator
    for t in times:
        before = frozen(scheduler)
        at = sampler_level(scheduler, t, schedule)
        assert_unchanged(scheduler, before)
        wanted = probe_state(scheduler, t), probe_scale(scheduler, t)
        fed = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
        again = sampler_level(scheduler, t, schedule)
        assert (again.level.alpha, again.level.sigma) == (at.level.alpha, at.level.sigma)
        output = network(schedule.output, fed, at.level, schedule.sigma_data)
        second = not getattr(scheduler, "state_in_first_order", True)
        out = scheduler.step(output, t, state, **options)
        yield t, at, wanted, state, fed, second, out
        state = out.prev_sample.double()


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_each_step_of_a_run_is_read_as_the_sampler_means_it(name, config):
    scheduler, schedule = make(name, config)
    times = start(scheduler)
    if name == "IPNDMScheduler":  # its first step, from pure noise, forgets the clean data
        scheduler.set_begin_index(1)
        times = times[1:]
    deterministic = not any(word in name for word in STOCHASTIC) and not config.get("stochastic_sampling")
    deterministic &= "sde" not in config.get("algorithm_type", "")
    calls, seen = 0, set()
    for t, at, ((alpha, sigma), scale), state, fed, second, out in walk(scheduler, schedule, times):
        level, calls = at.level, calls + 1
        seen.add(round(level.sigma / level.alpha if level.alpha else 1e9, 9))
        assert all(type(v) is float for v in (*level.to_dict().values(), level.alpha_dot, level.sigma_dot, at.scale))
        assert level.timestep == float(t)
        assert at.scale == pytest.approx(scale, rel=1e-6)
        torch.testing.assert_close(at.scale * state, fed, rtol=1e-5, atol=1e-6)
        if second and "DPM" in name:  # between two entries of `sigmas`: only the input's scale knows it
            sigma = (1 / scale**2 - 1) ** 0.5
        # 1 - alpha_bar of a float32 table has few digits at small t, alpha near pure noise
        assert level.alpha == pytest.approx(at.scale * alpha, rel=5e-4, abs=1e-6)
        assert level.sigma == pytest.approx(at.scale * sigma, rel=5e-4, abs=1e-6)
        if level.alpha:
            assert level.nsr == pytest.approx(level.sigma / level.alpha)
        if deterministic:  # the noise of the start stays the noise, whatever the solver
            torch.testing.assert_close(fed, level.alpha * CLEAN + level.sigma * NOISE, rtol=2e-3, atol=2e-4)
        clean = getattr(out, "pred_original_sample", None)
        if clean is not None and level.alpha > 1e-3:
            torch.testing.assert_close(clean.double(), CLEAN, rtol=1e-3, atol=1e-3)
    assert calls == len(times)
    if not name.startswith(("PNDM", "Heun", "FlowMatchHeun", "KDPM2Ancestral")):
        assert len(seen) == calls
    if hasattr(scheduler, "sigmas") and float(scheduler.sigmas[-1]) == 0:
        torch.testing.assert_close(out.prev_sample.double(), CLEAN, rtol=1e-3, atol=1e-3)


def test_every_known_sampler_is_in_the_matrix():
    from diffusers_repr.noise.sampler import _SAMPLERS

    ours = {"FlowMatchODEScheduler", "FlowMatchSDEScheduler"}  # in test_noise_paths.py
    assert {name for name, _ in CASES} | {"ScoreSdeVeScheduler"} | ours == set(_SAMPLERS)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_a_run_that_begins_in_the_middle(name, config, begin):
    scheduler, schedule = make(name, config)
    times = start(scheduler)
    skip = 2 * getattr(scheduler, "order", 1)
    if name == "PNDMScheduler":
        pytest.skip("PNDM's first steps are of another kind")
    if not hasattr(scheduler, "set_begin_index"):
        begin = False
    if begin:
        scheduler.set_begin_index(skip)
    for t, at, ((alpha, sigma), scale), _, _, second, _ in walk(scheduler, schedule, times[skip:]):
        assert at.level.timestep == float(t)
        assert at.scale == pytest.approx(scale, rel=1e-6)
        if not (second and "DPM" in name):
            assert at.level.alpha == pytest.approx(at.scale * alpha, rel=5e-4, abs=1e-6)
            assert at.level.sigma == pytest.approx(at.scale * sigma, rel=5e-4, abs=1e-6)


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[0] in (MULTISTEP, SINGLESTEP)])
def test_solvers_convert_outputs_at_the_level_read(name, config):
    scheduler, schedule = make(name, config)
    for t, at, *_, fed, _, _ in walk(scheduler, schedule, start(scheduler)):
        fresh = copy.deepcopy(scheduler)
        fresh._step_index = scheduler.step_index - 1
        fresh.register_to_config(algorithm_type="dpmsolver++")
        output = torch.tensor([[0.4, 1.1, -0.7]], dtype=torch.float64)
        x0, _ = to_x0_eps(output, fed, at.level, schedule.output)
        torch.testing.assert_close(x0(), fresh.convert_model_output(output, sample=fed), rtol=1e-4, atol=1e-4)
        assert float(t) == at.level.timestep


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_the_second_half_of_a_step_stands_between_two_sigmas(name):
    scheduler, schedule = make(name, SD)
    levels, halves = [], 0
    for _, at, *_, second, _ in walk(scheduler, schedule, start(scheduler)):
        if second:
            halves += 1
            before, after = levels[-1], float(scheduler.sigmas[scheduler.step_index])
            # the ancestral sampler aims at sigma_down = after^2 / before
            target = after if name == "KDPM2DiscreteScheduler" else after**2 / before
            assert at.level.nsr == pytest.approx((before * target) ** 0.5, rel=1e-5)
        levels.append(at.level.nsr)
    assert halves == 7


def test_rounded_timesteps_do_not_matter():
    scheduler, schedule = make(MULTISTEP, {**SD, "use_karras_sigmas": True})
    times = start(scheduler, 30)
    rounded = 0
    for _, at, *_ in walk(scheduler, schedule, times):
        rounded += abs(at.level.nsr / schedule.resolve(at.level.timestep).nsr - 1) > 1e-3
        assert at.level.nsr == pytest.approx(float(scheduler.sigmas[scheduler.step_index - 1]), rel=1e-12)
    assert rounded > 10


def test_of_a_repeated_timestep_the_sampler_knows_which():
    scheduler, schedule = make(MULTISTEP, {**SD, "use_karras_sigmas": True})
    times = start(scheduler, 60)
    first = next(i for i in range(59) if times[i] == times[i + 1])
    assert len(set(scheduler.sigmas[first : first + 2].tolist())) == 2
    for begin in (None, first, first + 1):
        if begin is not None:
            scheduler.set_begin_index(begin)
        at = sampler_level(scheduler, times[first], schedule)
        scheduler._init_step_index(times[first])
        assert at.level.nsr == pytest.approx(float(scheduler.sigmas[scheduler.step_index]), rel=1e-12)
        scheduler._step_index = None


def test_variance_exploding_states_are_fed_as_they_are():
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(6)
    scheduler.set_sigmas(6)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for at in range(6):
        sigma = scheduler.discrete_sigmas[at]
        found = sampler_level(scheduler, sigma * torch.ones(2), schedule)
        noised = scheduler.add_noise(CLEAN, NOISE, torch.tensor([at]))
        torch.testing.assert_close(
            found.level.alpha * CLEAN + found.level.sigma * NOISE, noised.view(1, 3), rtol=1e-6, atol=0
        )
        assert (found.scale, found.level.nsr) == (1.0, found.level.sigma)


@pytest.mark.parametrize(("name", "config"), dict(CASES).items())
def test_derivatives_are_those_of_the_process(name, config):
    scheduler, schedule = make(name, config)
    for _, at, *_ in walk(scheduler, schedule, start(scheduler)):
        level = at.level
        if schedule.kind == "vp" and level.nsr > schedule.resolve(schedule.timestep_range[1] - 1).nsr:
            continue  # the end of the table
        same = schedule.resolve(NoiseLevel(nsr=level.nsr))
        assert level.alpha == pytest.approx(same.alpha, rel=1e-6, abs=1e-9)
        near = {"rel": 5e-3} if schedule.kind == "vp" else {"rel": 1e-6, "abs": 1e-9}
        assert level.alpha_dot == pytest.approx(same.alpha_dot, **near)
        assert level.sigma_dot == pytest.approx(same.sigma_dot, **near)


def test_a_finished_run_is_read_as_one_to_come_and_a_new_grid_is_noticed():
    near = functools.partial(pytest.approx, rel=1e-12)
    scheduler, schedule = make("EulerDiscreteScheduler", SD)
    times = start(scheduler)
    for _ in walk(scheduler, schedule, times):
        pass
    assert sampler_level(scheduler, times[2], schedule).level.nsr == near(float(scheduler.sigmas[2]))
    times = start(scheduler, 5)
    assert sampler_level(scheduler, times[2], schedule).level.nsr == near(float(scheduler.sigmas[2]))
    scheduler.sigmas[2] *= 2
    assert sampler_level(scheduler, times[2], schedule).level.nsr == near(float(scheduler.sigmas[2]))


def test_timesteps_come_as_numbers_tensors_and_rounded_by_bfloat16():
    scheduler, schedule = make("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    t = start(scheduler)[3]
    wanted = float(scheduler.sigmas[3])
    for timestep in (t, float(t), t.expand(4), t.bfloat16()):
        assert sampler_level(scheduler, timestep, schedule).level.sigma == wanted
    with torch.inference_mode():
        start(scheduler)
        assert sampler_level(scheduler, t, schedule).level.sigma == wanted


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        ("SCMScheduler", TypeError, "SCMScheduler cannot be read.*known samplers: CosineDPMSolver"),
        ("CMStochasticIterativeScheduler", TypeError, "known samplers"),
        ("DDIMInverseScheduler", TypeError, "known samplers"),
        ("FlowMatchEulerDiscreteScheduler", ValueError, r"another process \(flow\).*trained on \(vp\)"),
        ("EDMEulerScheduler", ValueError, r"another process \(edm\)"),
        (MULTISTEP, ValueError, "call `set_timesteps`"),
    ],
)
def test_what_cannot_be_read_is_refused(scheduler, error, message):
    with pytest.raises(error, match=message):
        sampler_level(getattr(diffusers, scheduler)(), 3, make("DDIMScheduler", SD)[1])


@pytest.mark.parametrize("t", [261.5, -1, 1000, torch.tensor([1, 2])])
def test_ddim_has_whole_timesteps_only(t):
    with pytest.raises(ValueError, match=r"no timestep|one timestep; got"):
        sampler_level(*make("DDIMScheduler", SD)[:1], t, make("DDIMScheduler", SD)[1])


def test_other_refusals():
    scheduler, schedule = make("EulerDiscreteScheduler", SD)
    start(scheduler)
    with pytest.raises(ValueError, match=r"Timestep 5 is no step of this .*: 8 steps from 999 to 0"):
        sampler_level(scheduler, 5, schedule)
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(TypeError, match="from noise to data"):
        sampler_level(inverted, 5, NoiseSchedule("flow", "velocity"))
    narrow = diffusers.EDMEulerScheduler(sigma_data=0.5)
    with pytest.raises(ValueError, match=r"sigma_data=0.5.*trained on \(sigma_data=1.0\)"):
        sampler_level(narrow, 5, NoiseSchedule("edm", "edm", 1000, None, 0.002, 80.0, 1.0))


def levels(batch=False):
    """alpha, sigma and derivatives that belong to no schedule: the identities hold for any."""
    values = {"alpha": 0.37, "sigma": 1.21, "alpha_dot": -0.83, "sigma_dot": 0.59}
    if batch:
        values = {k: torch.tensor([v, 1.7 * v], dtype=torch.float64) for k, v in values.items()}
    return NoiseLevel(timestep=5.0, **values)


def read_eps(output, x, level, kind, sigma_data):
    if kind.startswith("edm"):  # alpha and sigma of EDM belong together
        return to_x0_eps(output, x, level, kind, sigma_data)[1]()
    schedule = NoiseSchedule("vp", kind, 10, torch.linspace(-0.1, -1, 10))
    return Prediction(output, x, level, schedule).eps


def edm_level(sigma_data, batch=False):
    edm = torch.tensor([0.4, 5.0], dtype=torch.float64) if batch else torch.tensor(1.9, dtype=torch.float64)
    norm = (edm**2 + sigma_data**2).sqrt()
    pair = (1 / norm, edm / norm)
    return NoiseLevel(1.0, None, None, *(pair if batch else (float(v) for v in pair)))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_shift_of_eps_is_what_the_changed_output_gives(kind, batch):
    data = 0.7
    level = edm_level(data, batch) if kind.startswith("edm") else levels(batch)
    output, x, shift = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = eps_shift_to_output(shift, level, kind, data)
    before, after = (read_eps(y, x, level, kind, data) for y in (output, output + change))
    torch.testing.assert_close(after - before, shift, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_difference_of_two_inputs_is_one_of_eps(kind, batch):
    data = 0.7
    level = edm_level(data, batch) if kind.startswith("edm") else levels(batch)
    output, other, x, offset = torch.randn(
        4, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    alpha = level.alpha.reshape(-1, 1, 1, 1) if batch else level.alpha
    change = output_difference(output, other, offset, level, kind, data)
    here, there = read_eps(output, x, level, kind, data), read_eps(other, x + alpha * offset, level, kind, data)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(change, eps_shift_to_output(here - there, level, kind, data), **close)
    torch.testing.assert_close(read_eps(output + change, x, level, kind, data) - here, here - there, **close)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_pure_noise(kind):
    one = torch.ones(1, 2, dtype=torch.bfloat16)
    level = NoiseLevel(1.0, alpha=0.0, sigma=1.0, alpha_dot=-1.0, sigma_dot=1.0)
    found = output_difference(one, 3 * one, 0.5 * one, level, kind)
    assert found.dtype == torch.float32
    wanted = {"sample": -1.5, "v_prediction": -2.5, "velocity": -2.5, "edm": -1.5, "edm_v": -2.5}.get(kind, -2.0)
    torch.testing.assert_close(found, torch.full((1, 2), wanted))
    if kind in ("epsilon", "score"):
        torch.testing.assert_close(eps_shift_to_output(one, level, kind).abs(), torch.ones(1, 2))
    else:
        with pytest.raises(ValueError, match=f"The {kind} that changes eps is undefined where alpha = 0"):
            eps_shift_to_output(one, level, kind)
    clean = NoiseLevel(0.0, alpha=1.0, sigma=0.0, alpha_dot=-1.0, sigma_dot=1.0)
    if kind == "score":
        with pytest.raises(ValueError, match="undefined where sigma = 0"):
            eps_shift_to_output(one, clean, kind)
    else:
        assert eps_shift_to_output(one, clean, kind).isfinite().all()


def test_unknown_kinds_and_missing_derivatives_are_told():
    one, level = torch.ones(1, 2), NoiseLevel(1.0, alpha=0.6, sigma=0.8)
    for call in (lambda k: eps_shift_to_output(one, level, k), lambda k: output_difference(one, one, one, level, k)):
        with pytest.raises(ValueError, match="known: epsilon, sample"):
            call("eps")
        with pytest.raises(ValueError, match="lacks alpha_dot"):
            call("velocity")
