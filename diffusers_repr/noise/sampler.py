"""The noise level at which a diffusers sampler stands, read without touching it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffusers_repr.noise.level import NoiseLevel
from diffusers_repr.noise.schedule import NoiseSchedule, _log_alpha_bar

# What a sampler's numbers are, and the state that its `step` takes.
_ALPHAS = "alphas"  # alphas_cumprod[t]; the state is what the network takes
_SOLVER = "solver"  # sigma / alpha (or flow sigmas) by step; the state is what the network takes
_SCALED = "scaled"  # sigma_k by step; the state is x_0 + sigma_k eps, fed times 1 / sqrt(1 + sigma_k^2)
_EDM = "edm"  # sigma_k by step; the same state, fed times 1 / sqrt(sigma_data^2 + sigma_k^2)
_FLOW = "flow"  # sigma_k by step; the state is (1 - sigma_k) x_0 + sigma_k eps, fed as it is
_PATH = "path"  # t by step, in training timesteps; the state is what the network takes
_ANGLES = "angles"  # alphas and betas (which are sigmas) by step; the state is what the network takes
_VE = "ve"  # the network is told sigma; the state x_0 + sigma eps is fed as it is

_SAMPLERS = {
    "DDIMScheduler": _ALPHAS,
    "DDIMParallelScheduler": _ALPHAS,
    "DDPMScheduler": _ALPHAS,
    "DDPMParallelScheduler": _ALPHAS,
    "LCMScheduler": _ALPHAS,
    "PNDMScheduler": _ALPHAS,
    "TCDScheduler": _ALPHAS,
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "SASolverScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
    "DPMSolverSDEScheduler": _SCALED,
    "EulerAncestralDiscreteScheduler": _SCALED,
    "EulerDiscreteScheduler": _SCALED,
    "HeunDiscreteScheduler": _SCALED,
    "KDPM2AncestralDiscreteScheduler": _SCALED,
    "KDPM2DiscreteScheduler": _SCALED,
    "LMSDiscreteScheduler": _SCALED,
    "CosineDPMSolverMultistepScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "EDMEulerScheduler": _EDM,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "FlowMatchODEScheduler": _PATH,
    "FlowMatchSDEScheduler": _PATH,
    "IPNDMScheduler": _ANGLES,
    "ScoreSdeVeScheduler": _VE,
}


@dataclass(frozen=True, eq=False)
class SamplerLevel:
    """Where a sampler stands.

    Attributes:
        level: Resolved level of what the network takes, `x_net = alpha x_0 + sigma eps`, with floats. Its timestep
            is the scheduler's own.
        scale: `x_net = scale * state`, where `state` is what the scheduler's `step` takes as `sample`.
    """

    level: NoiseLevel
    scale: float


class _Columns(NamedTuple):
    """alpha, sigma, their derivatives and scale for each row of one tensor of the scheduler."""

    source: Tensor
    version: int
    schedule: NoiseSchedule | None
    values: tuple[list[float], ...]


# A scheduler may keep its tables on the GPU; reading one number of them per step would wait for it.
_HELD: WeakKeyDictionary[Any, dict[str, _Columns]] = WeakKeyDictionary()


def sampler_level(scheduler: Any, timestep: float | Tensor, schedule: NoiseSchedule) -> SamplerLevel:
    """The noise level of the network's input at the step where `scheduler` stands.

    Samplers that count their steps are read at their step (before the first one: at `begin_index`, else at the step
    that `timestep` belongs to), from the sigmas that they integrate: a timestep rounded for the network changes
    nothing. The others (DDIM, DDPM, PNDM, LCM, TCD) are read at `timestep`. The scheduler stays as it is.

    Args:
        scheduler: A diffusers sampler, between `set_timesteps` and the end of the run.
        timestep: What the sampler's loop goes through, one of `scheduler.timesteps`, as a number or a tensor of
            equal numbers (ScoreSdeVe: the sigma that the network is told). Not looked at, and so never waited for,
            once the sampler counts its steps.
        schedule: The process that the network was trained on: derivatives are per unit of its time.

    Raises:
        TypeError: For a scheduler that is none of the known samplers.
        ValueError: If the sampler and `schedule` are different processes, for a timestep that the sampler does not
            visit, and before `set_timesteps`.

    Example:
        >>> from diffusers import EulerDiscreteScheduler
        >>> scheduler = EulerDiscreteScheduler()
        >>> scheduler.set_timesteps(10)
        >>> at = sampler_level(scheduler, scheduler.timesteps[3], NoiseSchedule.from_scheduler(scheduler))
        >>> round(at.level.nsr / float(scheduler.sigmas[3]), 6), at.scale == at.level.alpha
        (1.0, True)
    """
    kind = _kind(scheduler)
    form = _form(scheduler, kind)
    _check_process(scheduler, form, schedule)
    if kind == _VE:
        model_timestep = _number(timestep)
        return _pack(model_timestep, (1.0, model_timestep, 0.0, schedule.sigma_max, 1.0))
    if kind == _ALPHAS:
        model_timestep = _number(timestep)
        columns, row = _columns(scheduler, "alphas_cumprod", kind, form, None), int(model_timestep)
        if row != model_timestep or not 0 <= row < len(columns[0]):
            raise ValueError(
                f"{type(scheduler).__name__} has no timestep {model_timestep:g}; it has the whole numbers from 0 to "
                f"{len(columns[0]) - 1}."
            )
        return _pack(model_timestep, tuple(column[row] for column in columns))
    times, step = _step(scheduler, timestep, kind)
    name, row = _place(scheduler, step, kind)
    columns = _columns(scheduler, name, kind, form, schedule)
    return _pack(times[step], tuple(column[row] for column in columns))


def _kind(scheduler: Any) -> str:
    for cls in type(scheduler).__mro__:
        if cls.__name__ in _SAMPLERS:
            if scheduler.config.get("invert_sigmas"):
                raise TypeError(
                    f"{cls.__name__}(invert_sigmas=True) runs from noise to data with sigma for the data; only "
                    "samplers whose sigma is the noise are read."
                )
            return _SAMPLERS[cls.__name__]
    raise TypeError(
        f"The noise level of {type(scheduler).__name__} cannot be read while it samples; "
        f"known samplers: {', '.join(sorted(_SAMPLERS))}."
    )


def _form(scheduler: Any, kind: str) -> str:
    """The kind of process, as in NoiseSchedule, along which the sampler steps."""
    if kind == _SOLVER:
        return "flow" if scheduler.config.get("use_flow_sigmas") else "vp"
    if kind == _PATH:
        return NoiseSchedule.from_scheduler(scheduler).kind
    return kind if kind in (_EDM, _FLOW, _VE) else "vp"


def _check_process(scheduler: Any, form: str, schedule: NoiseSchedule) -> None:
    if form == schedule.kind and (form != "edm" or schedule.sigma_data == scheduler.config.sigma_data):
        return
    if form == "vp" and schedule.kind == "edm" and schedule.sigma_data == 1:
        return  # c_in of unit data is the alpha of a variance-preserving process
    own, given = form, str(schedule.kind)
    if own == given:
        own, given = f"sigma_data={scheduler.config.sigma_data}", f"sigma_data={schedule.sigma_data}"
    raise ValueError(
        f"{type(scheduler).__name__} samples another process ({own}) than the network was trained on ({given}). "
        "Use a scheduler of the model's process, or pass `schedule=NoiseSchedule(...)` to Denoiser."
    )


def _step(scheduler: Any, timestep: float | Tensor, kind: str) -> tuple[list[float], int]:
    """All timesteps, and the index of the one at which the sampler stands or is about to begin."""
    if kind == _SOLVER and scheduler.num_inference_steps is None:  # its sigmas still run the other way
        raise ValueError(f"{type(scheduler).__name__} has no steps yet; call `set_timesteps` first.")
    times = _columns(scheduler, "timesteps", kind, "", None)[0]
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index
    if index is not None and index < len(times):
        return times, index
    model_timestep = _number(timestep)
    nearest = min(times, key=lambda time: abs(time - model_timestep))
    if abs(nearest - model_timestep) > 2**-8 * max(abs(model_timestep), abs(nearest)):  # as far as bfloat16 rounds
        raise ValueError(
            f"Timestep {model_timestep:g} is no step of this {type(scheduler).__name__}: {len(times)} steps from "
            f"{times[0]:g} to {times[-1]:g}."
        )
    found = [i for i, time in enumerate(times) if time == nearest]
    return times, found[min(1, len(found) - 1)]  # of a repeated timestep, diffusers begins at the second


def _place(scheduler: Any, step: int, kind: str) -> tuple[str, int]:
    """The tensor of the scheduler that holds the sigma of this network call, and the row in it."""
    if kind in (_ANGLES, _PATH):
        return "betas" if kind == _ANGLES else "timesteps", step
    if step == scheduler.step_index and not getattr(scheduler, "state_in_first_order", True):
        if hasattr(scheduler, "mid_point_sigma"):
            return "mid_point_sigma", 0
        if hasattr(scheduler, "sigmas_interpol"):
            return "sigmas_interpol", step - 1 if hasattr(scheduler, "sigmas_up") else step
    return "sigmas", step


def _columns(
    scheduler: Any, name: str, kind: str, form: str, schedule: NoiseSchedule | None
) -> tuple[list[float], ...]:
    """What a tensor of the scheduler stands for, computed once for each tensor; without a form, the tensor itself."""
    held, source = _HELD.setdefault(scheduler, {}), getattr(scheduler, name)
    version, key = 0 if source.is_inference() else source._version, f"{name} {form}"
    found = held.get(key)
    if found is None or found.source is not source or found.version != version or found.schedule is not schedule:
        values = _compute(scheduler, name, source.detach().cpu().double().reshape(-1), kind, form, schedule)
        found = held[key] = _Columns(source, version, schedule, tuple(value.tolist() for value in values))
    return found.values


def _compute(
    scheduler: Any, name: str, source: Tensor, kind: str, form: str, schedule: NoiseSchedule | None
) -> tuple[Tensor, ...]:
    one = torch.ones_like(source)
    if not form:
        return (source,)
    if kind == _PATH:
        own = NoiseSchedule.from_scheduler(scheduler)
        return *own._process(source), one
    if kind == _ALPHAS:
        table = _log_alpha_bar(scheduler)
        own = NoiseSchedule("vp", "epsilon", len(table), table)
        return *own._process(torch.arange(len(table), dtype=torch.float64, device="cpu")), one
    if form == "flow":
        return 1 - source, source, -one, one, one
    nsr = source / scheduler.alphas.detach().cpu().double() if kind == _ANGLES else source
    data = scheduler.config.sigma_data if form == "edm" else 1.0
    alpha = (nsr**2 + data**2).rsqrt()
    sigma = (1 + (data / nsr) ** 2).rsqrt()  # nsr / sqrt(nsr^2 + data^2), also where nsr is infinite
    assert schedule is not None
    log_nsr = nsr.log().nan_to_num(0.0, math.inf, -math.inf)  # unused rows of some tables are no numbers
    _, _, alpha_dot, sigma_dot = schedule._process(schedule._time_of_log_nsr(log_nsr))
    return alpha, sigma, alpha_dot, sigma_dot, alpha if kind in (_SCALED, _EDM) else one


def _pack(timestep: float, row: tuple[float, ...]) -> SamplerLevel:
    alpha, sigma, alpha_dot, sigma_dot, scale = row
    nsr = sigma / alpha if alpha else math.inf
    half_log_snr = -math.log(nsr) if nsr else math.inf
    return SamplerLevel(NoiseLevel(timestep, nsr, half_log_snr, alpha, sigma, alpha_dot, sigma_dot), scale)


def _number(timestep: float | Tensor) -> float:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.reshape(-1).tolist()
    if not values or values.count(values[0]) != len(values):
        raise ValueError(f"A sampler stands at one timestep; got {values}.")
    return float(values[0])
