"""`guide`: guidance on an unmodified pipeline, or on a loop of your own."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from torch import nn

from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.cfg import CFGTerm
from diffusers_repr.guidance.engine import Engine
from diffusers_repr.guidance.stats import GuidanceStats
from diffusers_repr.noise import NoiseSchedule

_GUIDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
            timesteps, and methods that move the latents are refused.
        null: For a `Denoiser` and `CFG`: the null condition, with as many rows as the calls have.

    Returns:
        A handle: context manager, `remove()`, `stats`.

    Raises:
        TypeError: For a target or a guidance that is none.
        ValueError: If a guidance cannot act on this model, or the model is guided already. Nothing is changed then.
        RuntimeError: For a compiled network; and at the end of a run, if a guidance acted at none of its steps.
    """
    denoiser, pipe = (target, None) if isinstance(target, Denoiser) else (_denoiser(target), target)
    configs = [guidance] if isinstance(guidance, Guidance) else list(guidance)
    if not configs:
        raise ValueError("No guidance was given: guide(pipe, [PAG(3.0)]).")
    wrong = next((config for config in configs if not isinstance(config, Guidance)), None)
    if wrong is not None:
        raise TypeError(f"A guidance is a config such as PAG(3.0); got {wrong!r} ({type(wrong).__name__}).")
    if pipe is not None and (scheduler is not None or null is not None):
        raise ValueError("scheduler= and null= are for a loop of your own; the pipeline has its own.")
    if denoiser.model in _GUIDED:
        raise ValueError(
            f"This {type(denoiser.model).__name__} is guided already. Give all guidances to one call, "
            "guide(pipe, [PAG(3.0), SAG(0.75)]), or remove the other first (handle.remove())."
        )
    refuse_compiled(denoiser.model)
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
    engine = Engine(denoiser, active, cfgs[0] if cfgs else None, pipe, inputs)
    return GuidanceHandle(engine, pipe, scheduler)


class GuidanceHandle:
    """What `guide` returns: guidance that is on until `remove()` or the end of the `with` block.

    Attributes:
        stats: Lanes, passes and backward passes of the newest run, step by step.
    """

    def __init__(self, engine: Engine, pipe: Any, scheduler: Any) -> None:
        self._engine, self._pipe, self._scheduler = engine, pipe, scheduler
        self._stack = ExitStack()
        self._warned: set[str] = set()
        self._on = True
        if not engine.terms and engine.cfg is None:
            return  # everything is off: no hook, the stock pipeline
        _GUIDED.add(engine.model)
        self._stack.callback(_GUIDED.discard, engine.model)
        engine.install(self._stack)
        if pipe is not None:
            # Found anew at each call: a pipeline's scheduler may be replaced at any time.
            handle = engine.model.register_forward_pre_hook(self._find_scheduler, prepend=True)
            self._stack.callback(handle.remove)
        if pipe is not None or scheduler is not None:
            self._wrap(pipe.scheduler if pipe is not None else scheduler)

    @property
    def stats(self) -> GuidanceStats:
        """Cost of the newest run."""
        return self._engine.stats

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._remove(judge=kind is None)
        if kind is None and not self.stats.calls and (self._engine.terms or self._engine.cfg):
            raise RuntimeError(
                "Nothing was guided: the network was not called inside the block (or called by `model.forward`, which "
                "no hook sees)."
            )

    def remove(self) -> None:
        """End the guidance; everything is as before. Judges the last run as `guide` says."""
        self._remove(judge=True)

    def _remove(self, judge: bool) -> None:
        if not self._on:
            return
        self._on = False
        self._stack.close()
        if judge:
            self._judge()

    def _judge(self) -> None:
        for label in self._engine.without_effect():
            if label not in self._warned:
                self._warned.add(label)
                warnings.warn(f"{label} changed nothing in a whole run: its correction was zero.", stacklevel=4)
        self._engine.judge()

    def __repr__(self) -> str:
        names = [term.label for term in self._engine.terms] + (["CFG"] if self._engine.cfg else [])
        return f"GuidanceHandle({', '.join(names) or 'all off'}{'' if self._on else ', removed'})"

    # The scheduler

    def _find_scheduler(self, module: nn.Module, args: Any) -> None:
        if self._pipe.scheduler is not self._engine.scheduler:
            self._wrap(self._pipe.scheduler)

    def _wrap(self, scheduler: Any) -> None:
        self._engine.scheduler = scheduler
        if scheduler is not None:
            self._engine.schedule = NoiseSchedule.from_scheduler(scheduler)
            self._override(scheduler, "step", self._step)
            self._override(scheduler, "set_timesteps", self._set_timesteps)

    def _override(self, scheduler: Any, name: str, function: Callable[..., Any]) -> None:
        """Put `function(scheduler, own method, *args, **kwargs)` before a method, on this object only."""
        before = scheduler.__dict__.get(name)
        inner = getattr(type(scheduler), name) if before is None else before
        guided = weakref.ref(scheduler)

        # Bound anew by a deep copy, which then is another scheduler: pipelines are copied to make conditions.
        @functools.wraps(getattr(type(scheduler), name))
        def method(own: Any, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(inner, own) if before is None else inner
            return function(call, args, kwargs) if own is guided() and self._on else call(*args, **kwargs)

        scheduler.__dict__[name] = types.MethodType(method, scheduler)

        def restore() -> None:
            if before is None:
                scheduler.__dict__.pop(name, None)
            else:
                scheduler.__dict__[name] = before

        self._stack.callback(restore)

    def _step(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(inner).bind(*args, **kwargs)
        given.arguments.update(self._engine.step_arguments(dict(given.arguments)))
        return inner(*given.args, **given.kwargs)

    def _set_timesteps(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._judge()
        self._engine.new_run()
        return inner(*args, **kwargs)


def _denoiser(target: Any) -> Denoiser:
    if not hasattr(target, "components") or not hasattr(target, "config"):
        raise TypeError(
            f"guide takes a diffusers pipeline or a Denoiser; got {type(target).__name__}. For a bare network: "
            "Denoiser(model, scheduler)."
        )
    return Denoiser.from_pipe(target)


def refuse_own_guidance(pipe: Any) -> None:
    """Raise ValueError for a pipeline that adds lanes of its own to the batch."""
    name = type(pipe).__name__
    if "SAG" in name or "InstructPix2Pix" in name or "Perp" in name:
        raise ValueError(f"{name} has more than a conditional and a null lane; use the plain pipeline and guide that.")


def _number(terms: Sequence[Any]) -> None:
    """Distinct labels for terms of one kind."""
    for term in terms:
        same = [other for other in terms if type(other.config) is type(term.config)]
        if len(same) > 1:
            term.label = f"{type(term.config).__name__}[{same.index(term)}]"
