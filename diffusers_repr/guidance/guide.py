"""`guide`: guidance on an unmodified pipeline, or on a loop of your own."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from torch import nn

from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.hooks import Hooks, hooks_stay
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.cfg import CFG, CFGTerm
from diffusers_repr.guidance.engine.callers import calling_pipeline, check_plain, refuse_own_guidance
from diffusers_repr.guidance.engine.engine import Engine
from diffusers_repr.guidance.engine.guided_call import GuidedModel
from diffusers_repr.guidance.engine.scheduler_hooks import SchedulerWatcher, watch_scheduler
from diffusers_repr.guidance.engine.stats import GuidanceStats
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import NoiseSchedule

_NO_TARGET = "guide takes a diffusers pipeline or a Denoiser; got {}. For a bare network: Denoiser(model, scheduler)."
# Network -> its handle. Not a strong reference: the handle holds the network.
_GUIDED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[GuidanceHandle]] = weakref.WeakKeyDictionary()


def guide(
    target: Any,
    guidance: Guidance | Sequence[Guidance],
    *,
    scheduler: Any = None,
    null: Condition | Mapping[str, Any] | None = None,
) -> GuidanceHandle:
    """Put guidance on an unmodified pipeline, or on a loop of your own, until the handle is removed.

    `with guide(pipe, [PAG(3.0)]): pipe(...)`, or `handle = guide(...)` and `handle.remove()`.

    It acts where the network is called, by torch hooks, and on the scheduler's step where a method moves the latents:
    `epsilon = epsilon_base + sum of the terms`, in every form of prediction. Terms of scale 0 do nothing: the result
    is bit-equal to the pipeline's own, with as many network calls.

    Args:
        target: A diffusers pipeline of a known family, or a `Denoiser` whose network a loop of yours calls.
        guidance: One config or several; each kind as often as you like, `CFG` once.
        scheduler: For a `Denoiser`: the scheduler that your loop steps. Without it noise levels are those of training
            timesteps, and methods that move the latents are refused. All rows of a call are conditional; a second
            call for the same samples at one step is the null condition's, for a guidance of the loop's own.
        null: For a `Denoiser` and `CFG`: the null condition, one row or as many as the calls have;
            `denoiser.conditioner.null()` is that of training.

    Returns:
        A handle: context manager, `remove()`, `stats`.

    Raises:
        TypeError: For a target or a guidance that is none.
        ValueError: If a guidance cannot act on this model, or the model is guided already. Nothing is changed then.
        RuntimeError: For a compiled network; and at the end of a run, if a guidance acted at none of its steps.
    """
    denoiser, pipe = (target, None) if isinstance(target, Denoiser) else (_denoiser(target), target)
    configs = _configs(guidance)
    cfg_given = any(isinstance(config, CFG) for config in configs)
    if pipe is None and null is not None and not cfg_given:
        raise ValueError("null= is the null condition of CFG, and no CFG was given.")
    if pipe is not None and (scheduler is not None or null is not None):
        raise ValueError("scheduler= and null= are for a loop of your own; the pipeline has its own.")
    if null is not None and not isinstance(null, Condition | Mapping):
        raise TypeError(
            "null= is a condition, such as denoiser.condition(prompt=''), or the network's inputs by name; got "
            f"{type(null).__name__}."
        )
    if denoiser.model in _GUIDED:
        raise ValueError(_guided_already(denoiser.model))
    check_plain(denoiser.model)
    refuse_own_guidance(pipe)
    terms = [config.bind(denoiser) for config in configs]
    cfgs = [term for term in terms if isinstance(term, CFGTerm)]
    if len(cfgs) > 1:
        raise ValueError(f"CFG stands for the pipeline's own guidance, which there is one of; got {len(cfgs)}.")
    active = [term for term in terms if not isinstance(term, CFGTerm) and term.config.scale != 0]
    moving = [t for t in active if t.gradient is not None and t.gradient.update != "eps"]
    if moving and pipe is None and scheduler is None:
        raise ValueError(f"{moving[0].label} moves the latents, in the scheduler's step: pass scheduler=.")
    _number(active)
    inputs = null.kwargs() if isinstance(null, Condition) else null
    guided = GuidedModel(denoiser, active, cfgs[0] if cfgs else None, pipe, inputs)
    engine = Engine(guided)
    engine.check()
    return GuidanceHandle(engine, scheduler)


class GuidanceHandle(SchedulerWatcher):
    """What `guide` returns: guidance that is on until `remove()` or the end of the `with` block.

    Attributes:
        stats: Lanes, passes and backward passes of the newest run, step by step.
    """

    def __init__(self, engine: Engine, scheduler: Any) -> None:
        self._engine, self._pipe = engine, engine.guided.pipe
        self._stack, self._watch = ExitStack(), ExitStack()
        self._warned: set[str] = set()
        self._on = True
        if not self._guidances:
            return  # everything is off: no hook, the stock pipeline
        try:
            self._install(scheduler if self._pipe is None else self._pipe.scheduler)
        except BaseException:
            self._stack.close()
            raise

    def _install(self, scheduler: Any) -> None:
        model = self._engine.model
        with hooks_stay():  # of two threads that guide one network, one is the first
            if model in _GUIDED:
                raise ValueError(_guided_already(model))
            _GUIDED[model] = weakref.ref(self)
        self._stack.callback(_GUIDED.pop, model, None)
        self._stack.callback(self._watch.close)
        if scheduler is not None:
            self._follow(scheduler)
        self._engine.install(self._stack)
        # Found anew at each call: a pipeline's scheduler may be replaced at any time. It also keeps this handle.
        Hooks(self._stack, self._engine.owner.enters).before(model, self._find_scheduler, prepend=True)

    @property
    def stats(self) -> GuidanceStats:
        """Cost of the newest run."""
        return self._engine.stats

    @property
    def _guidances(self) -> list[str]:
        """Labels of what is on."""
        guided = self._engine.guided
        return [term.label for term in guided.terms] + (["CFG"] if guided.cfg else [])

    def __enter__(self) -> Self:
        if not self._on:
            raise RuntimeError("This guidance was removed; make another: guide(...).")
        self._engine.owner.settle()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        was_on = self._on
        if error is not None:
            if was_on and self._engine.owner.is_busy_elsewhere():  # whose samples would be half guided
                error.add_note("A guided run is under way in another thread, and stays guided: then handle.remove().")
            else:
                self._end()
            return
        self._check_idle()
        self._end()
        if was_on:
            # `_interrupt`, private in diffusers, is what a callback sets to end a run early; most pipelines have no
            # public `interrupt`. Without it a run that was ended before an interval would raise.
            self._judge(finished=not getattr(self._pipe, "_interrupt", False))
        if not self.stats.calls and self._guidances:
            raise RuntimeError(
                "Nothing was guided: the network was not called inside the block (or called by `model.forward`, which "
                "no hook sees)."
            )

    def remove(self) -> None:
        """End the guidance; everything is as before. Judges the last run as `guide` says, if it came to its end.

        Raises:
            RuntimeError: If a guided run is under way in another thread; it goes on, guided.
        """
        if self._on:
            self._check_idle()
            self._end()
            self._judge(finished=False)

    def _check_idle(self) -> None:
        if self._engine.owner.is_busy_elsewhere():
            raise RuntimeError(
                "A guided run is under way in another thread, and its guidance cannot end meanwhile. Wait for it "
                "(thread.join(), or the future's result()) before handle.remove() or the end of the block."
            )

    def _end(self) -> None:
        self._on = False
        self._stack.close()

    def _judge(self, *, finished: bool) -> None:
        whole = self._engine.is_whole(finished=finished)
        for label in self._engine.run.without_effect() if whole else ():
            if label not in self._warned:
                self._warned.add(label)
                warnings.warn(f"{label} changed nothing in a whole run: its correction was zero.", stacklevel=3)
        self._engine.judge(finished=finished)

    def __repr__(self) -> str:
        return f"GuidanceHandle({', '.join(self._guidances) or 'all off'}{'' if self._on else ', removed'})"

    # The scheduler

    def _find_scheduler(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self._engine.model or self._pipe is None:
            return
        caller = calling_pipeline(self._engine.model)  # may be another one that has the same network
        scheduler = (self._pipe if caller is None else caller).scheduler
        if scheduler is not self._engine.run.scheduler:
            self._judge(finished=False)
            self._follow(scheduler)
            self._engine.new_run()

    def _follow(self, scheduler: Any) -> None:
        schedule = (
            self._engine.guided.denoiser.schedule if self._pipe is None else NoiseSchedule.from_scheduler(scheduler)
        )
        self._watch.close()
        self._watch.callback(watch_scheduler(scheduler, self))
        self._engine.step_by(scheduler, schedule)

    def before_run(self) -> None:
        """A sampling run begins; the last one is judged."""
        if not self._engine.owner.enters():
            return
        self._judge(finished=False)
        self._engine.new_run()

    def before_step(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the scheduler's step gets instead."""
        if not self._engine.owner.enters():
            return arguments
        return self._engine.step_arguments(arguments)


def is_guided(target: Any) -> bool:
    """Whether `guide` acts on a pipeline, a `Denoiser` or a network.

    Guidances of scale 0 alone are off: they set nothing, and this is False.

    Raises:
        TypeError: For anything else.
    """
    return _network(target) in _GUIDED


def unguide(target: Any) -> None:
    """End the guidance of a pipeline, a `Denoiser` or a network: `handle.remove()` for who has no handle.

    Raises:
        TypeError: For anything else.
        ValueError: If it is not guided.
        RuntimeError: As `handle.remove()`.
    """
    network = _network(target)
    found = _GUIDED.get(network)
    handle = None if found is None else found()
    if handle is None:
        raise ValueError(f"This {type(network).__name__} is not guided; is_guided(...) tells.")
    handle.remove()


def _network(target: Any) -> nn.Module:
    if isinstance(target, nn.Module):
        return plain_module(target)
    if isinstance(target, Denoiser):
        return target.model
    for name in COMPONENTS if hasattr(target, "components") else ():
        component = getattr(target, name, None)
        if isinstance(component, nn.Module):
            return plain_module(component)
    raise TypeError(_NO_TARGET.format(type(target).__name__))


def _guided_already(model: nn.Module) -> str:
    return (
        f"This {type(model).__name__} is guided already. Give all guidances to one call, guide(pipe, [PAG(3.0), "
        "SAG(0.75)]), or remove the other first: handle.remove(), or unguide(pipe). Two threads that guide at once "
        "need a network each."
    )


def _configs(guidance: Any) -> list[Guidance]:
    if isinstance(guidance, Guidance):
        return [guidance]
    if isinstance(guidance, str) or not isinstance(guidance, Sequence):
        raise TypeError(
            "A guidance is a config such as PAG(3.0), or a list of them; "
            f"got {guidance!r} ({type(guidance).__name__})."
        )
    for config in guidance:
        if not isinstance(config, Guidance):
            raise TypeError(f"A guidance is a config such as PAG(3.0); got {config!r} ({type(config).__name__}).")
    if not guidance:
        raise ValueError("No guidance was given: guide(pipe, [PAG(3.0)]).")
    return list(guidance)


def _denoiser(target: Any) -> Denoiser:
    if not hasattr(target, "components") or not hasattr(target, "config"):
        raise TypeError(_NO_TARGET.format(type(target).__name__))
    return Denoiser.from_pipe(target)


def _number(terms: Sequence[Any]) -> None:
    """Distinct labels for terms of one kind."""
    for term in terms:
        same = [other for other in terms if type(other.config) is type(term.config)]
        if len(same) > 1:
            term.label = f"{type(term.config).__name__}[{same.index(term)}]"
