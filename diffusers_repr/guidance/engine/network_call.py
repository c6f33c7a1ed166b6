"""What a network call is: its rows, its noise level, and whether it is a further one at the same step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffusers_repr.capture.caches import LaneCaches, cache_kinds
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import BatchLanes, equal_halves
from diffusers_repr.guidance.engine.callers import (
    calling_pipeline,
    check_seen,
    is_off,
    refuse_own_guidance,
)
from diffusers_repr.guidance.engine.pending_step import PendingStep
from diffusers_repr.guidance.engine.run import SamplingRun
from diffusers_repr.noise import NoiseLevel, sampler_level

_ROUNDED = 2.0**-7  # a timestep divided and multiplied in bfloat16


class CallParser:
    """Reads network calls of one pipeline, or of a loop; what it finds for a whole run is kept in the `SamplingRun`.

    Args:
        denoiser: The model.
        pipe: The pipeline that is guided; None for a loop of the user's.
        check: Raises if the network cannot be guided as it is.
    """

    def __init__(self, denoiser: Denoiser, pipe: Any, check: Callable[[], None]) -> None:
        self.denoiser, self.pipe, self._check = denoiser, pipe, check

    def parse(self, inputs: dict[str, Any], run: SamplingRun, pending: PendingStep) -> tuple[NetworkCall, bool]:
        """The call with these keyword inputs.

        Args:
            inputs: All rows.
            run: The run that it is of.
            pending: What an earlier call at the same step of the sampler has left, if there was one.

        Returns:
            The call, and whether it is a further one for the same samples at the same step.

        Raises:
            ValueError: If its lanes or its noise level cannot be found; if the network caches what is read.
            RuntimeError: If a part of the network that is changed or read is compiled.
        """
        family = self.denoiser.family
        family.check_names(inputs)
        given = inputs[family.sample_name]
        rows = given.shape[0]
        level, scale = self._level(inputs, run)
        self._check_network(level, run)
        call = NetworkCall(inputs, rows, BatchLanes(slice(0, rows)), family.sample(inputs), level, scale)
        if pending.is_followed_by(call, given):
            return call, True
        if rows not in run.batches:
            run.batches[rows] = self._lanes(inputs, run)
        call.batch = run.batches[rows]
        return call, False

    def _check_network(self, level: NoiseLevel, run: SamplingRun) -> None:
        """Look at the network where a run begins: of a loop without scheduler, where the noise does not fall."""
        nsr = float(level.nsr)
        if run.nsr is None or (run.scheduler is None and nsr >= run.nsr):
            if self.pipe is not None:
                check_seen(self.pipe, self.denoiser.model, called=True)
            self._check()
            run.cached = bool(cache_kinds(self.denoiser.model))
        if run.nsr is not None and nsr > run.nsr:
            run.caches = LaneCaches()
        run.nsr = nsr

    def _lanes(self, inputs: dict[str, Any], run: SamplingRun) -> BatchLanes:
        family = self.denoiser.family
        caller = calling_pipeline(self.denoiser.model)
        alone = BatchLanes(slice(0, inputs[family.sample_name].shape[0]))
        off = caller is not None and is_off(caller, self.denoiser.model)
        if caller is not None and self.pipe is None:
            lanes = alone if off else family.lanes(caller, inputs)
            if lanes.null is not None or getattr(caller, "do_classifier_free_guidance", False):
                raise ValueError(
                    f"guide was given a Denoiser, but a {type(caller).__name__} calls its network: guide(pipe, ...)."
                )
            return lanes
        if caller is not None:
            refuse_own_guidance(caller)
            if getattr(caller, "do_perturbed_attention_guidance", False):
                raise ValueError(f"{type(caller).__name__} perturbs attention by itself; call it with pag_scale=0.")
            run.rescale = float(getattr(caller, "guidance_rescale", 0) or 0)
            return alone if off else family.lanes(caller, inputs)
        if self.pipe is not None and family.conditioning == "text" and equal_halves(inputs[family.sample_name]):
            raise ValueError(
                f"A loop of your own calls the network of the guided {type(self.pipe).__name__} with two equal "
                "halves; which rows have the condition is not known. Use guide(Denoiser.from_pipe(pipe), null=...), "
                "and call the network with the conditional rows only."
            )
        return family.lanes(None if family.conditioning == "text" else self.pipe, inputs)

    def _level(self, inputs: Mapping[str, Any], run: SamplingRun) -> tuple[NoiseLevel, float]:
        family = self.denoiser.family
        given = torch.as_tensor(inputs[family.timestep_name])
        if given.numel() > 1 and self.pipe is None and not bool((given == given.flatten()[0]).all()):
            raise ValueError(f"Guidance needs one noise level for the whole batch; got timesteps {given.tolist()}.")
        timestep = family.training_timestep(given.flatten()[0])
        if run.scheduler is None:
            return run.schedule.resolve(float(timestep)), 1.0
        where = sampler_level(run.scheduler, timestep, run.schedule)
        if timestep.device.type == "cpu":  # elsewhere it would have to be waited for
            stands, called = float(where.level.timestep), float(timestep)
            if abs(stands - called) > _ROUNDED * max(abs(stands), abs(called)):
                raise ValueError(
                    f"The network is called at timestep {called:g}, but the {type(run.scheduler).__name__} stands at "
                    f"{stands:g}. In a loop of your own call `scheduler.step` after each call of the network; what is "
                    "no step of the sampler belongs outside of the guidance."
                )
        return where.level, where.scale
