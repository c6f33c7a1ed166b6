"""`Engine`: guidance at the network's call, by hooks, whatever pipeline or loop makes that call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import UNBATCHED, index_batch
from diffusers_repr.capture.capture import is_breaking_off
from diffusers_repr.capture.executor import Executor
from diffusers_repr.capture.gradient import GradientStop, GradientTape
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.capture.offload import is_offloaded, send_back
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.guidance.base import GuidanceTerm, widened
from diffusers_repr.guidance.cfg import CFGTerm
from diffusers_repr.guidance.engine.gradients import EpsGradient, latent_change
from diffusers_repr.guidance.engine.network_call import (
    CallParser,
    FirstCall,
    check_seen,
    not_stepped,
    null_inputs,
    with_first,
)
from diffusers_repr.guidance.engine.owner import Owner
from diffusers_repr.guidance.engine.pending_step import PendingStep
from diffusers_repr.guidance.engine.stats import Example, GuidanceStats, RunRecord, StepStats
from diffusers_repr.guidance.engine.step import GuidedStep
from diffusers_repr.noise import NoiseSchedule


@dataclass(eq=False)
class _Running:
    """A call between the network's pre-hook and its hook."""

    call: NetworkCall
    stats: StepStats
    active: list[tuple[GuidanceTerm, float]]
    which: slice
    gradient: EpsGradient | None = None
    in_pass: bool = False  # the gradient is taken in the call's own pass
    follows: bool = False  # a second call at the same step: the other half of classifier-free guidance


class Engine:
    """Plans each network call, runs what it takes, and changes what the call returns.

    Args:
        denoiser: The model.
        terms: Bound guidances, those of scale 0 left out.
        cfg: Classifier-free guidance that replaces the pipeline's own, or None.
        pipe: The pipeline whose calls are guided; None for a loop of the user's.
        null: Inputs of the null condition, for a loop whose calls have none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        terms: Sequence[GuidanceTerm],
        cfg: CFGTerm | None,
        pipe: Any,
        null: Mapping[str, Any] | None = None,
    ) -> None:
        self.denoiser, self.terms, self.cfg, self.pipe, self.null = denoiser, list(terms), cfg, pipe, null
        self.model: nn.Module = denoiser.model
        self.stats = GuidanceStats()
        lanes = [term.lane for term in terms if term.lane is not None]
        observers = {key: observer for term in terms for key, observer in term.observers.items()}
        requests = [term.gradient for term in terms if term.gradient is not None]
        layers = dict.fromkeys(path for request in requests for path in request.layers)
        self._executor = Executor(self.model, denoiser.family, lanes, observers)
        self._tape = GradientTape(self.model, list(layers))
        self._unbatched = UNBATCHED | set(denoiser.family.unbatched)
        self._names = forward_names(self.model)
        self._reader = CallParser(denoiser, pipe)
        self._running: _Running | None = None
        self._busy = False
        self.owner = Owner(self.model, pipe)
        self.record = RunRecord()
        self._between = PendingStep()

    def install(self, stack: ExitStack) -> None:
        """Set the hooks; the stack removes them."""
        self._executor.install(stack)
        self._tape.install(stack)
        Hooks(stack, self._acts).before(self.model, self._before)
        Hooks(stack, self.owner.is_in).after(self.model, self._after, prepend=True, always_call=True)
        stack.callback(self._recover)

    def _acts(self) -> bool:
        if self.owner.enters():
            return True
        if self.owner.is_in():  # another's call in the thread where a guided one may have been interrupted
            self._recover()
        return False

    @property
    def schedule(self) -> NoiseSchedule:
        """The process that is sampled; `schedule.output` is the form of predictions."""
        return self._reader.schedule

    @property
    def scheduler(self) -> Any:
        """The sampler whose steps are seen, or None."""
        return self._reader.scheduler

    def step_by(self, scheduler: Any, schedule: NoiseSchedule) -> None:
        """The sampler from now on, and the process that it samples."""
        self._reader.scheduler, self._reader.schedule = scheduler, schedule
        self._between = PendingStep()

    # Runs and steps

    def new_run(self) -> None:
        """A sampling run begins."""
        self.stats.steps = []
        self.record = RunRecord()
        self._reader.new_run()
        self._between = PendingStep()
        for term in self.terms:
            term.starts()

    def is_whole(self, *, finished: bool) -> bool:
        """Whether the run has reached its end: known to have (`finished`), or seen at the scheduler's last step."""
        self._recover()
        levels, times = self.record.levels, getattr(self.scheduler, "timesteps", None)
        return bool(levels) and (finished or times is None or float(times[-1]) == float(levels[-1].timestep))

    def judge(self, *, finished: bool) -> None:
        """Raise RuntimeError if a guidance acted at no step of a whole run."""
        if not self.is_whole(finished=finished):
            self.record.levels = []
        cfg = [] if self.cfg is None or self.cfg.config.scale == 1 else [self.cfg]
        self.record.judge([*self.terms, *cfg])

    def step_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the scheduler's step gets instead: latents that a guidance moved, CFG's own prediction."""
        if self.pipe is not None:
            check_seen(self.pipe, self.model, called=self._between.first is not None)
        if self.cfg is not None and self._between.waits:
            self._abandon()
            raise ValueError(self.cfg.needs_null(self.pipe))
        between, self._between = self._between, PendingStep()
        return between.step_arguments(self.denoiser, arguments)

    def _abandon(self) -> None:
        """A call that does not reach its end: everything as before it; the run is not judged."""
        self._running = None
        self._executor.end()
        self._tape.end()
        self.record.levels = []
        self._between = PendingStep()

    def _recover(self) -> None:
        """After an interrupt, of which torch tells no hook."""
        if self._running is not None:
            self._tape.abandon()  # leaves the gradient mode to whoever has come back to it
            self._abandon()

    # Before the network

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not guided: a copy's calls, those that a term makes itself, and those whose output nobody gets.
        if module is not self.model or self._busy or is_breaking_off(module):
            return None
        self._recover()
        self._busy = True
        try:
            family, given = self.denoiser.family, {**dict(zip(self._names, args, strict=False)), **kwargs}
            return (), family.listed(self._plan(family.stacked(given)))
        except BaseException:
            self._abandon()
            raise
        finally:
            self._busy = False

    def _plan(self, inputs: dict[str, Any]) -> dict[str, Any]:
        call, follows = self._reader.read(inputs, self._between.first)
        step = StepStats(call.level)
        if not self.stats.steps:
            own = index_batch(inputs, call.rows, call.batch.cond, self._unbatched)
            self.stats.example = Example(self.model, self.denoiser.family.listed(own))
        self.stats.steps.append(step)
        self.stats.calls += 1
        self.record.levels.append(call.level)
        if follows:
            return self._follow(call, step)
        if self._between.pending:
            raise RuntimeError(not_stepped(self.scheduler))
        self._between = PendingStep()
        if self.scheduler is not None:
            self._between.first = FirstCall(call, inputs[self.denoiser.family.sample_name])
        active = [(term, w) for term in self.terms if (w := term.weight(call.level))]
        if call.batch.null is not None and (active or self.cfg is not None):
            self._reader.refuse_rescale()
        for term, weight in active:
            if term.gradient is not None and term.gradient.update != "eps":
                self._move(call, term, weight, step)
        lanes = [term.lane for term, _ in active if term.lane is not None]
        observers = [key for term, _ in active for key in term.observers]
        # Without signal (alpha = 0) an energy has no gradient in eps.
        eps = [(t, w) for t, w in active if t.gradient is not None and t.gradient.update == "eps"]
        wanted = eps if float(call.level.alpha) else []
        gradient = EpsGradient(self.denoiser, self.schedule, call, wanted) if wanted else None
        needs_null = call.batch.null is not None and (self.cfg is None or self.cfg.weight(call.level) != 0)
        in_pass = gradient is not None and gradient.reads_network and not lanes and not observers
        which = call.batch.cond if in_pass or not needs_null else slice(0, call.rows)
        running = _Running(call, step, active, which, gradient, in_pass)
        if gradient is not None and gradient.reads_network and not in_pass:
            self._gradient_pass(call, gradient, step)
        self._running = running
        given = self._executor.begin(call, which, lanes, observers)
        if in_pass and gradient is not None:
            gradient.prepare(self._forward, step)
            given = gradient.begin(self._tape, given, stop=False)
        step.passes += 1
        step.lanes += (which.stop - which.start) // call.samples + len(lanes)
        return given

    def _follow(self, call: NetworkCall, step: StepStats) -> dict[str, Any]:
        """A further call at one step: the null condition, at the latents that the first call was moved to."""
        step.passes, step.lanes = 1, 1
        self._running = _Running(call, step, [], slice(0, call.rows), follows=True)
        inputs = index_batch(call.inputs, call.rows, slice(0, call.rows), self._unbatched)
        if self._between.shift is None:
            return inputs
        x = call.x + self._between.shift.to(call.x.dtype)
        return self.denoiser.family.with_sample(inputs, x)

    # Gradients

    def _gradient_pass(self, call: NetworkCall, gradient: EpsGradient, step: StepStats) -> None:
        """A pass of its own over the conditional rows, as far as the loss reads."""
        gradient.prepare(self._forward, step)
        inputs = index_batch(call.inputs, call.rows, call.batch.cond, self._unbatched)
        inputs = gradient.begin(self._tape, inputs, stop=True)
        step.passes, step.lanes, step.backward_passes = step.passes + 1, step.lanes + 1, step.backward_passes + 1
        try:
            self._tape.finish(self._forward(self.model, inputs))
        except GradientStop as stop:
            step.stopped.append(stop.path)
        finally:
            if is_offloaded(self.model):  # also where the forward did not reach its end
                send_back(self.model)
            self._tape.end()
        gradient.found = self._tape.gradient

    def _move(self, call: NetworkCall, term: GuidanceTerm, weight: float, step: StepStats) -> None:
        """Step on the latents, for the network's input now and for the scheduler's step after."""
        gradient = EpsGradient(self.denoiser, self.schedule, call, [(term, 1.0)])
        if gradient.reads_network:
            self._gradient_pass(call, gradient, step)
        else:
            gradient.compute_direct()
            step.backward_passes += 1
        assert term.gradient is not None
        assert gradient.found is not None
        shift = latent_change(widened(gradient.found), weight, term.gradient.update)
        self.record.note(term.label, shift)
        step.acted.append(term.label)
        x = widened(call.x).clone()
        for rows in (call.batch.cond, call.batch.null):
            if rows is not None:
                x[rows] += shift
        call.x = x.to(call.x.dtype)
        call.inputs = self.denoiser.family.with_sample(call.inputs, call.x)
        self._between.move(shift, call.scale)

    # After the network

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        running = self._running
        if module is not self.model or self._busy or running is None:
            return None
        if output is None:
            self._abandon()
            return None
        family = self.denoiser.family
        raw = family.stacked_output(output if isinstance(output, Tensor) else output[0])
        self._busy = True
        try:
            changed = self._after_follower(running, raw) if running.follows else self._after_call(running, raw)
            self._running = None
        finally:
            self._busy = False
            if self._running is not None:
                self._abandon()
            self._executor.end()
            self._tape.end()
        return with_first(output, family.listed_output(changed))

    def _after_call(self, running: _Running, raw: Tensor) -> Tensor:
        call, stats, family = running.call, running.stats, self.denoiser.family
        gradient = running.gradient
        if gradient is not None and running.in_pass:
            self._tape.finish(raw)
            gradient.found = self._tape.gradient
            stats.backward_passes += 1
            self._tape.end()
            raw = raw.detach()
        own, lanes = self._executor.split(raw)
        stats.joined, stats.joining = call.joined, len(lanes)
        self._executor.end()
        raws: dict[str, Tensor] = {}
        start = running.which.start
        for name, rows in (("cond", call.batch.cond), ("null", call.batch.null)):
            if rows is not None and rows.start >= start and rows.stop <= running.which.stop:
                raws[name] = own[rows.start - start : rows.stop - start]
        x = call.x[call.batch.cond]

        def read(value: Tensor) -> Tensor:
            return widened(family.output(value, x))

        step = GuidedStep(
            self.denoiser,
            self.schedule,
            call,
            read(raws["cond"]),
            read(raws["null"]) if "null" in raws else None,
            {name: read(value) for name, value in lanes.items()},
            stats,
            self._forward,
        )
        cfg_weight = 0.0 if self.cfg is None else self.cfg.weight(call.level)
        if step.null is None and call.batch.null is not None and (self.cfg is None or cfg_weight):
            step.null = step.run(call.batch.null)
        elif cfg_weight and step.null is None and self.null is not None:
            null = null_inputs(self.null, call.samples, self._unbatched)
            step.null = step.run(call.batch.cond, condition=null)
        total = self._total(running, step)
        return self._compose(step, raws, total, cfg_weight)

    def _total(self, running: _Running, step: GuidedStep) -> Tensor | None:
        parts = []
        for term, weight in running.active:
            if term.gradient is not None:
                continue
            correction = term.correction(step)
            if correction is not None:
                parts.append(weight * correction)
            self.record.note(term.label, correction)
            running.stats.acted.append(term.label)
        if running.gradient is not None:
            if not running.gradient.reads_network:
                running.gradient.compute_direct()
                running.stats.backward_passes += 1
            correction = running.gradient.correction()
            for term in running.gradient.terms:
                running.stats.acted.append(term.label)
                self.record.note(term.label, correction)
            if correction is not None:
                parts.append(correction)
        return sum(parts[1:], parts[0]) if parts else None

    def _compose(self, step: GuidedStep, raws: dict[str, Tensor], total: Tensor | None, cfg_weight: float) -> Tensor:
        family, batch = self.denoiser.family, step.call.batch
        cond, null = step.cond, step.null
        waits = False
        if self.cfg is not None:
            waits = batch.null is None and null is None
            if waits and self.scheduler is None and cfg_weight:
                raise ValueError(self.cfg.needs_null(self.pipe))
            if cfg_weight and null is not None:
                cond = self.cfg.combine(cond, null, cfg_weight)
                self.record.note(self.cfg.label, cond - step.cond)
            null = None if batch.null is None else cond
        between = self._between
        between.waits, between.cond, between.correction = waits and cfg_weight != 0, step.cond, total
        if batch.null is not None and cond is not step.cond:  # what a difference from the condition is to be free of
            between.correction = cond - step.cond if total is None else cond - step.cond + total
        if total is not None:
            cond = cond + total
            null = None if null is None else null + total
        if waits and not cfg_weight:
            between.replacement = cond
        parts = [(batch.cond, cond, raws["cond"])]
        if batch.null is not None and null is not None:
            parts.append((batch.null, null, raws.get("null", raws["cond"])))
        parts.sort(key=lambda part: part[0].start)
        return torch.cat([family.with_output(raw, value.to(raw.dtype)) for _, value, raw in parts])

    def _after_follower(self, running: _Running, raw: Tensor) -> Tensor:
        family, call = self.denoiser.family, running.call
        value, between = widened(family.output(raw, call.x)), self._between
        if self.cfg is not None and between.waits and between.cond is not None:
            combined = self.cfg.combine(between.cond, value, self.cfg.weight(call.level))
            self.record.note(self.cfg.label, combined - between.cond)
            between.replacement = combined if between.correction is None else combined + between.correction
            between.waits = False
        if between.correction is None:
            return raw
        return family.with_output(raw, (value + between.correction).to(raw.dtype))

    # Shared

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        family = self.denoiser.family
        called = family.listed(inputs)
        output = model.forward(**called) if model is self.model else model(**called)
        return family.stacked_output(output if isinstance(output, Tensor) else output[0])
