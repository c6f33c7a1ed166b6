"""`Engine`: guidance at the network's call, by hooks, whatever pipeline or loop makes that call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch
from diffusers_repr.capture.capture import is_breaking_off
from diffusers_repr.capture.executor import Executor
from diffusers_repr.capture.gradient import GradientTape
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.guidance.engine.callers import COMPILED_SINCE, check_caches, check_plain, check_seen
from diffusers_repr.guidance.engine.guided_call import GuidedCall, GuidedModel
from diffusers_repr.guidance.engine.network_call import CallParser
from diffusers_repr.guidance.engine.owner import Owner
from diffusers_repr.guidance.engine.pending_step import PendingStep
from diffusers_repr.guidance.engine.run import SamplingRun
from diffusers_repr.guidance.engine.stats import Example, GuidanceStats, StepStats
from diffusers_repr.noise import NoiseSchedule


class Engine:
    """Sees each call of the guided network, lets it be planned and changed, and keeps what outlives it.

    It holds one object a lifetime: the `GuidedModel` as long as the guidance is on, a `SamplingRun` from
    `set_timesteps` to `set_timesteps`, a `PendingStep` from the first call at a step to the scheduler's step, a
    `GuidedCall` from the hook before the network to the hook after it (docs/how_guidance_runs.md).

    Args:
        guided: The model and its guidances.
    """

    def __init__(self, guided: GuidedModel) -> None:
        denoiser, terms = guided.denoiser, guided.terms
        self.guided = guided
        self.model: nn.Module = denoiser.model
        self.owner = Owner(self.model, guided.pipe)
        self.stats = GuidanceStats()
        self.run = SamplingRun(None, denoiser.schedule)
        self._pending = PendingStep()
        self._call: GuidedCall | None = None
        self._busy = False  # plans or finishes a call: calls that terms make meanwhile are not guided
        lanes = [term.lane for term in terms if term.lane is not None]
        observers = {key: observer for term in terms for key, observer in term.observers.items()}
        layers = dict.fromkeys(path for term in terms if term.gradient is not None for path in term.gradient.layers)
        self._executor = Executor(self.model, denoiser.family, lanes, observers)
        self._tape = GradientTape(self.model, list(layers))
        self._parser = CallParser(denoiser, guided.pipe, lambda: self.check(COMPILED_SINCE))
        self._names = forward_names(self.model)

    def check(self, remedy: str | None = None) -> None:
        """Raise unless the guidances can act on the network as it is.

        Args:
            remedy: What to do about compiled parts.

        Raises:
            RuntimeError: If what they change or read is compiled.
            ValueError: If it caches activations that they would read, or lanes would mix.
        """
        touched = self._executor.touched | self._executor.hooked | set(self._tape.layers)
        check_plain(self.model, touched, remedy)
        check_caches(self.model, self.guided.terms)

    def install(self, stack: ExitStack) -> None:
        """Set the hooks; the stack removes them."""
        self._executor.install(stack)
        self._tape.install(stack)
        Hooks(stack, self._acts).before(self.model, self._before)
        Hooks(stack, self.owner.is_in).after(self.model, self._after, prepend=True, always_call=True)
        stack.callback(self._recover)
        stack.callback(lambda: self.run.caches.clear())

    def _acts(self) -> bool:
        if self.owner.enters():
            return True
        if self.owner.is_in():  # another's call in the thread where a guided one may have been interrupted
            self._recover()
        return False

    # Runs and steps

    def step_by(self, scheduler: Any, schedule: NoiseSchedule) -> None:
        """The sampler from now on, and the process that it samples."""
        self.run, self._pending = SamplingRun(scheduler, schedule), PendingStep()

    def new_run(self) -> None:
        """A sampling run begins: nothing of the one before is kept."""
        self.stats.steps = []
        self.step_by(self.run.scheduler, self.run.schedule)
        for term in self.guided.terms:
            term.starts()

    def is_whole(self, *, finished: bool) -> bool:
        """Whether the run has reached its end: known to have (`finished`), or seen at the scheduler's last step."""
        self._recover()
        return self.run.is_whole(finished=finished)

    def judge(self, *, finished: bool) -> None:
        """Raise RuntimeError if a guidance acted at no step of a whole run."""
        if not self.is_whole(finished=finished):
            self.run.levels = []
        cfg = self.guided.cfg
        self.run.judge([*self.guided.terms, *([] if cfg is None or cfg.config.scale == 1 else [cfg])])

    def step_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the scheduler's step gets instead: latents that a guidance moved, CFG's own prediction."""
        guided = self.guided
        if guided.pipe is not None:
            check_seen(guided.pipe, self.model, called=self._pending.called)
        if guided.cfg is not None and self._pending.waits:
            self._abandon()
            raise ValueError(guided.cfg.needs_null(guided.pipe))
        pending, self._pending = self._pending, PendingStep()
        return pending.step_arguments(guided.denoiser, arguments)

    def _abandon(self) -> None:
        """A call that does not reach its end: everything as before it; the run is not judged."""
        self._call = None
        self._executor.end()
        self._tape.end()
        self.run.levels = []
        self._pending = PendingStep()

    def _recover(self) -> None:
        """After an interrupt, of which torch tells no hook."""
        if self._call is not None:
            self._tape.abandon()  # leaves the gradient mode to whoever has come back to it
            self._abandon()

    # One call

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not guided: a copy's calls, those that a term makes itself, and those whose output nobody gets.
        if module is not self.model or self._busy or is_breaking_off(module):
            return None
        self._recover()
        self._busy = True
        try:
            family, given = self.guided.denoiser.family, {**dict(zip(self._names, args, strict=False)), **kwargs}
            return (), family.listed(self._begin(family.stacked(given)))
        except BaseException:
            self._abandon()
            raise
        finally:
            self._busy = False

    def _begin(self, inputs: dict[str, Any]) -> dict[str, Any]:
        guided = self.guided
        call, follows = self._parser.parse(inputs, self.run, self._pending)
        stats = self._count(call)
        if not follows:
            if self._pending.is_due:
                raise RuntimeError(_not_stepped(self.run.scheduler))
            given = inputs[guided.denoiser.family.sample_name]
            self._pending = PendingStep() if self.run.scheduler is None else PendingStep(call, given)
        made = GuidedCall(guided, self._executor, self._tape, self.run, self._pending, call, stats, follows)
        made.plan()
        self._call = made
        return made.begin()

    def _count(self, call: NetworkCall) -> StepStats:
        stats = StepStats(call.level)
        if not self.stats.steps:
            own = index_batch(call.inputs, call.rows, call.batch.cond, self.guided.unbatched)
            self.stats.example = Example(self.model, self.guided.denoiser.family.listed(own))
        self.stats.steps.append(stats)
        self.stats.calls += 1
        self.run.levels.append(call.level)
        return stats

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call
        if module is not self.model or self._busy or call is None:
            return None
        if output is None:
            self._abandon()
            return None
        family, self._busy = self.guided.denoiser.family, True
        try:
            changed = call.finish(family.stacked_output(output if isinstance(output, Tensor) else output[0]))
            self._call = None
        finally:
            self._busy = False
            if self._call is not None:
                self._abandon()
            self._executor.end()
            self._tape.end()
        return _with_first(output, family.listed_output(changed))


def _not_stepped(scheduler: Any) -> str:
    """Message for a step that the scheduler did not make between two calls of the network."""
    return (
        f"The network is called again, but its {type(scheduler).__name__} was not stepped after the last call: what a "
        "guidance did to the latents or the prediction would be lost. Step the scheduler that is guided, by its "
        "`step`: the pipeline's own, or the one given as guide(denoiser, ..., scheduler=)."
    )


def _with_first(output: Any, value: Tensor) -> Any:
    """What a network returned, with another first tensor."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    first = next(iter(output.keys()))
    return type(output)(**{**output, first: value})
