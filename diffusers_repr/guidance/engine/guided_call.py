"""`GuidedCall`: one call of the guided network, from the plan of its passes to the output that its caller gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, map_rows, without_rows
from diffusers_repr.capture.executor import Executor, not_called
from diffusers_repr.capture.gradient import GradientStop, GradientTape
from diffusers_repr.capture.lanes import Lane, NetworkCall
from diffusers_repr.capture.offload import is_offloaded, send_back
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import GuidanceTerm
from diffusers_repr.guidance.cfg import CFGTerm
from diffusers_repr.guidance.engine.gradients import EpsGradient, LatentSteps
from diffusers_repr.guidance.engine.pending_step import PendingStep
from diffusers_repr.guidance.engine.run import SamplingRun
from diffusers_repr.guidance.engine.stats import StepStats
from diffusers_repr.guidance.step import GuidedStep, widened


@dataclass(frozen=True, eq=False)
class GuidedModel:
    """A model and what guides it: the same as long as the guidance is on.

    Attributes:
        denoiser: The model.
        terms: Bound guidances, those of scale 0 left out.
        cfg: Classifier-free guidance that replaces the pipeline's own, or None.
        pipe: The pipeline whose calls are guided; None for a loop of the user's.
        null: Inputs of the null condition, for a loop whose calls have none.
    """

    denoiser: Denoiser
    terms: Sequence[GuidanceTerm]
    cfg: CFGTerm | None
    pipe: Any = None
    null: Mapping[str, Any] | None = None

    @property
    def unbatched(self) -> frozenset[str]:
        """Names of inputs that have no rows."""
        return without_rows(self.denoiser.family)


@dataclass(eq=False)
class GuidedCall:
    """Between the hook before the network and the hook after it.

    Attributes:
        guided: The model and its guidances.
        executor: Runs its lanes.
        tape: Takes its gradients.
        run: The run that this is a call of.
        pending: What is kept from this call to the scheduler's step.
        call: The call, as the pipeline made it.
        stats: What it costs.
        follows: Whether it is a further call at one step: the other half of classifier-free guidance.
    """

    guided: GuidedModel
    executor: Executor
    tape: GradientTape
    run: SamplingRun
    pending: PendingStep
    call: NetworkCall
    stats: StepStats
    follows: bool

    def __post_init__(self) -> None:
        self.denoiser, self.cfg = self.guided.denoiser, self.guided.cfg
        self._active: list[tuple[GuidanceTerm, float]] = []
        self._which = slice(0, self.call.rows)  # what of the batch is run
        self._gradient: EpsGradient | None = None
        self._in_pass = False  # the gradient is taken in the call's own pass
        self._maker: GuidanceTerm | None = None  # of passes besides the call's own; CFG's if None
        self._made = 0  # how many so far

    # Before the network

    def plan(self) -> None:
        """What acts, and by which passes; those that come before the call's own are made here."""
        if self.follows:
            return
        call, level = self.call, self.call.level
        self._active = [(term, w) for term in self.guided.terms if (w := term.weight(level))]
        if call.batch.null is not None and (self._active or self.cfg is not None):
            self.run.refuse_rescale()
        for term, weight in self._active:
            if term.gradient is not None and term.gradient.update != "eps":
                self._move(term, weight)
        # Without signal (alpha = 0) an energy has no gradient in eps.
        eps = [(t, w) for t, w in self._active if t.gradient is not None and t.gradient.update == "eps"]
        wanted = eps if float(level.alpha) else []
        gradient = EpsGradient(self.denoiser, self.run.schedule, call, wanted) if wanted else None
        reads = gradient is not None and gradient.reads_network
        needs_null = call.batch.null is not None and (self.cfg is None or self.cfg.weight(level) != 0)
        self._gradient, self._in_pass = gradient, reads and not self._lanes() and not self._observers()
        # A cache compares and adds what it holds to the rows of the call: they stay the same in all steps.
        if self._in_pass or not (needs_null or self.run.cached):
            self._which = call.batch.cond
        if gradient is not None and reads and not self._in_pass:
            self._gradient_pass(gradient)

    def begin(self) -> dict[str, Any]:
        """The inputs that the network gets instead, for the call's own pass."""
        call, stats, which = self.call, self.stats, self._which
        if self.follows:
            stats.passes, stats.lanes = 1, 1
            return self._begin_follower()
        joining = [] if self.run.cached else self._lanes()
        given = self.executor.begin(call, which, joining, self._observers())
        if self._in_pass and self._gradient is not None:
            self._prepare(self._gradient)
            given = self._gradient.begin(self.tape, given, stop=False)
        stats.passes += 1
        stats.lanes += (which.stop - which.start) // call.samples + len(joining)
        return given

    def _begin_follower(self) -> dict[str, Any]:
        """The null condition, at the latents that the first call was moved to."""
        call, denoiser, shift = self.call, self.denoiser, self.pending.shift
        inputs = index_batch(call.inputs, call.rows, self._which, self.guided.unbatched)
        if shift is None:
            return inputs
        return denoiser.family.with_sample(inputs, call.x + shift.to(call.x.dtype))

    def _lanes(self) -> list[Any]:
        return [term.lane for term, _ in self._active if term.lane is not None]

    def _observers(self) -> list[str]:
        return [key for term, _ in self._active for key in term.observers]

    # Passes besides the call's own

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The first output of a network; of the guided one without the hooks on its call.

        Under caches each pass of a step that a term makes has its own, the same from step to step.
        """
        key, label = ("CFG", "CFG") if self._maker is None else (self._maker.key, self._maker.label)
        if not self.run.caches.are_on(model, label):
            return self._run(model, inputs)
        self._made += 1
        with self.run.caches.of(model, f"{key} {self._made}"):
            return self._run(model, inputs)

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        self.stats.passes, self.stats.lanes = self.stats.passes + 1, self.stats.lanes + 1
        family = self.denoiser.family
        called = family.listed(inputs)
        output = model.forward(**called) if model is self.denoiser.model else model(**called)
        return family.stacked_output(output if isinstance(output, Tensor) else output[0])

    def _lane_alone(self, lane: Lane) -> Any:
        """A perturbed lane by a pass of its own, with caches of its own."""
        call, model = self.call, self.denoiser.model
        inputs = index_batch(call.inputs, call.rows, call.batch.cond, self.guided.unbatched)
        with self.run.caches.of(model, lane.name) as first, self.executor.alone(lane, call) as ran:
            output = self._run(model, inputs)
        if first and not ran:
            raise RuntimeError(not_called([lane]))
        return output

    @contextmanager
    def _may_stop(self) -> Iterator[None]:
        """Around a pass that may be left early; offloaded weights then are where they were."""
        try:
            yield
        except GradientStop as stop:
            self.stats.stopped.append(stop.path)
            raise
        finally:
            if is_offloaded(self.denoiser.model):  # also where the forward did not reach its end
                send_back(self.denoiser.model)

    def _prepare(self, gradient: EpsGradient) -> None:
        """What terms compute ahead of their losses, by passes of their own."""

        def forward(inputs: dict[str, Any]) -> Any:
            with self._may_stop():
                return self.forward(self.denoiser.model, inputs)

        for term in gradient.terms:
            for half in gradient.halves:
                term.prepare(half, forward)

    def _gradient_pass(self, gradient: EpsGradient) -> None:
        """A pass of its own over the conditional rows, or all of them, as far as the loss reads."""
        call = self.call
        self._prepare(gradient)
        inputs = call.inputs
        if gradient.both:
            self.stats.lanes += 1
        else:
            inputs = index_batch(inputs, call.rows, call.batch.cond, self.guided.unbatched)
        inputs = gradient.begin(self.tape, inputs, stop=True)
        self.stats.backward_passes += 1
        try:
            with suppress(GradientStop), self._may_stop():
                self.tape.finish(self.forward(self.denoiser.model, inputs))
        finally:
            self.tape.end()
        gradient.found = self.tape.gradient

    def _move(self, term: GuidanceTerm, weight: float) -> None:
        """Steps on the latents, for the network's input now and for the scheduler's step after."""
        call, request = self.call, term.gradient
        assert request is not None
        steps = LatentSteps(weight, request.update)
        for _ in range(request.steps):
            gradient = EpsGradient(self.denoiser, self.run.schedule, call, [(term, 1.0)])
            if gradient.reads_network:
                self._gradient_pass(gradient)
            else:
                gradient.compute_direct()
                self.stats.backward_passes += 1
            assert gradient.found is not None
            shift = steps.change(widened(gradient.found))
            self.run.note(term.label, shift)
            x = widened(call.x).clone()
            for rows in (call.batch.cond, call.batch.null):
                if rows is not None:
                    x[rows] += shift
            call.x = x.to(call.x.dtype)
            call.inputs = self.denoiser.family.with_sample(call.inputs, call.x)
            self.pending.move(shift, call.scale)
        self.stats.acted.append(term.label)

    # After the network

    def finish(self, raw: Tensor) -> Tensor:
        """The output that the caller gets, from what the network gave in the call's own pass."""
        if self.follows:
            return self._finish_follower(raw)
        call, family = self.call, self.denoiser.family
        if self._in_pass and self._gradient is not None:
            self.tape.finish(raw)
            self._gradient.found = self.tape.gradient
            self.stats.backward_passes += 1
            self.tape.end()
            raw = raw.detach()
        own, lanes = self.executor.split(raw)
        self.stats.joined, self.stats.joining = call.joined, len(lanes)
        self.executor.end()
        if self.run.cached:
            lanes = {lane.name: self._lane_alone(lane) for lane in self._lanes()}
        raws: dict[str, Tensor] = {}
        start = self._which.start
        for name, rows in (("cond", call.batch.cond), ("null", call.batch.null)):
            if rows is not None and rows.start >= start and rows.stop <= self._which.stop:
                raws[name] = own[rows.start - start : rows.stop - start]
        x = call.x[call.batch.cond]
        read = {name: widened(family.output(value, x)) for name, value in {**raws, **lanes}.items()}
        cond, null = read.pop("cond"), read.pop("null", None)
        step = GuidedStep(self.denoiser, self.run.schedule, call, cond, null, read, self.forward)
        cfg_weight = 0.0 if self.cfg is None else self.cfg.weight(call.level)
        if step.null is None and call.batch.null is not None and (self.cfg is None or cfg_weight):
            step.null = step.run(call.batch.null)
        elif cfg_weight and step.null is None and self.guided.null is not None:
            condition = _null_inputs(self.guided.null, call.samples, self.guided.unbatched)
            step.null = step.run(call.batch.cond, condition=condition)
        return self._compose(step, raws, self._total(step), cfg_weight)

    def _total(self, step: GuidedStep) -> Tensor | None:
        """The sum of all corrections; None for none."""
        parts = []
        for term, weight in self._active:
            if term.gradient is None:
                self._maker, self._made = term, 0
                correction = term.correction(step)
                self._note(term, correction)
                if correction is not None:
                    parts.append(weight * correction)
        gradient = self._gradient
        if gradient is not None:
            if not gradient.reads_network:
                gradient.compute_direct()
                self.stats.backward_passes += 1
            correction = gradient.correction()
            for term in gradient.terms:
                self._note(term, correction)
            if correction is not None:
                parts.append(correction)
        return sum(parts[1:], parts[0]) if parts else None

    def _compose(self, step: GuidedStep, raws: dict[str, Tensor], total: Tensor | None, cfg_weight: float) -> Tensor:
        """Both predictions with all corrections, in the rows of the call; what further calls get is left pending."""
        family, batch, pending = self.denoiser.family, self.call.batch, self.pending
        cond, null = step.cond, step.null
        waits = False
        if self.cfg is not None:
            waits = batch.null is None and null is None
            if waits and self.run.scheduler is None and cfg_weight:
                raise ValueError(self.cfg.needs_null(self.guided.pipe))
            if cfg_weight and null is not None:
                cond = self.cfg.combine(cond, null, cfg_weight)
                self.run.note(self.cfg.label, cond - step.cond)
            null = None if batch.null is None else cond
        pending.waits, pending.cond, pending.correction = waits and cfg_weight != 0, step.cond, total
        if batch.null is not None and cond is not step.cond:  # what a difference from the condition is to be free of
            pending.correction = cond - step.cond if total is None else cond - step.cond + total
        if total is not None:
            cond = cond + total
            null = None if null is None else null + total
        if waits and not cfg_weight:
            pending.replacement = cond
        parts = [(batch.cond, cond, raws["cond"])]
        if batch.null is not None and null is not None:
            parts.append((batch.null, null, raws.get("null", raws["cond"])))
        parts.sort(key=lambda part: part[0].start)
        return torch.cat([family.with_output(raw, value.to(raw.dtype)) for _, value, raw in parts])

    def _finish_follower(self, raw: Tensor) -> Tensor:
        family, call, pending = self.denoiser.family, self.call, self.pending
        value = widened(family.output(raw, call.x))
        if self.cfg is not None and pending.waits and pending.cond is not None:
            combined = self.cfg.combine(pending.cond, value, self.cfg.weight(call.level))
            self.run.note(self.cfg.label, combined - pending.cond)
            pending.replacement = combined if pending.correction is None else combined + pending.correction
            pending.waits = False
        if pending.correction is None:
            return raw
        return family.with_output(raw, (value + pending.correction).to(raw.dtype))

    def _note(self, term: GuidanceTerm, correction: Tensor | None) -> None:
        self.run.note(term.label, correction)
        self.stats.acted.append(term.label)


def _null_inputs(null: Mapping[str, Any], samples: int, unbatched: Collection[str]) -> Mapping[str, Any]:
    """The null condition with as many rows as a call has, from one row or as many.

    Raises:
        ValueError: If it has another number of rows.
    """
    rows: set[int] = set()
    for name, value in null.items():
        if name not in unbatched and isinstance(value, Tensor) and value.ndim:
            rows.add(value.shape[0])
    if samples in rows or not rows:
        return null
    if rows != {1}:
        raise ValueError(f"The null condition has {max(rows)} rows; the call has {samples}. Give 1 or {samples}.")
    return map_rows(null, 1, lambda value: value.expand(samples, *value.shape[1:]), unbatched)
