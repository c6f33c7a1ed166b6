"""`watch_scheduler`: sees the steps of one scheduler object, which stays what it is."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

_STEPS = ("step", "step_pred", "step_correct")  # the last two: ScoreSdeVeScheduler
_WATCH = "_diffusers_repr_watch"


class SchedulerWatcher:
    """Who sees the steps of a scheduler. Both methods do nothing here."""

    def before_run(self) -> None:
        """`set_timesteps` is about to be called."""

    def before_step(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A step is about to be made with these arguments, by name; returns those to make it with."""
        return arguments


class _Watch:
    """The class that one scheduler object has while it is watched.

    The object's `__class__` is exchanged, and comes back: a scheduler has no hooks. A method set on the object instead
    would go with its attributes, which pipelines copy and restore, and into its copies; without either, no guidance
    could move latents or replace the pipeline's own, and no run would be known to begin.
    """

    def __init__(self, scheduler: Any) -> None:
        self.plain, self.watchers = type(scheduler), list[SchedulerWatcher]()
        self._scheduler = weakref.ref(scheduler)
        methods = {name: self._step(name) for name in _STEPS if hasattr(self.plain, name)}
        methods["set_timesteps"] = self._set_timesteps()
        own = {name: scheduler.__dict__.pop(name) for name in methods if name in scheduler.__dict__}
        self._own: dict[str, Any] = own  # methods that someone had set on the object
        namespace = {
            "__module__": self.plain.__module__,
            "__qualname__": self.plain.__qualname__,
            "__doc__": self.plain.__doc__,
            "__reduce_ex__": _reduce_plain(self.plain),
            _WATCH: self,
            **methods,
        }
        scheduler.__class__ = type(self.plain.__name__, (self.plain,), namespace)

    def is_of(self, scheduler: Any) -> bool:
        """Whether this is the scheduler that is watched; another one may have its class."""
        return self._scheduler() is scheduler

    def remove(self, watcher: SchedulerWatcher) -> None:
        """Watch no longer; after the last watcher the scheduler is as before."""
        self.watchers.remove(watcher)
        scheduler = self._scheduler()
        if not self.watchers and scheduler is not None:
            scheduler.__class__ = self.plain
            scheduler.__dict__.update(self._own)

    def _inner(self, scheduler: Any, name: str) -> Callable[..., Any]:
        if self.is_of(scheduler) and name in self._own:
            return self._own[name]
        return functools.partial(getattr(self.plain, name), scheduler)

    def _step(self, name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(self.plain, name))
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            inner = self._inner(scheduler, name)
            if not self.is_of(scheduler):
                return inner(*args, **kwargs)
            given = inspect.signature(inner).bind(*args, **kwargs)
            for watcher in tuple(self.watchers):  # another thread may end one
                given.arguments.update(watcher.before_step(dict(given.arguments)))
            return inner(*given.args, **given.kwargs)

        return step

    def _set_timesteps(self) -> Callable[..., Any]:
        @functools.wraps(self.plain.set_timesteps)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            for watcher in tuple(self.watchers) if self.is_of(scheduler) else ():
                watcher.before_run()
            return self._inner(scheduler, "set_timesteps")(*args, **kwargs)

        return set_timesteps


def watch_scheduler(scheduler: Any, watcher: SchedulerWatcher) -> Callable[[], None]:
    """Let `watcher` see the runs and steps of a scheduler object.

    Returns:
        A function that ends it; with the last one ended the scheduler is as it was.

    Raises:
        TypeError: For an object without `set_timesteps` and `step`.
    """
    cls = type(scheduler)
    if not hasattr(cls, "set_timesteps") or not any(hasattr(cls, name) for name in _STEPS):
        raise TypeError(f"A scheduler has set_timesteps and step; got {cls.__name__}.")
    watch = getattr(cls, _WATCH, None)
    if watch is None or not watch.is_of(scheduler):
        watch = _Watch(scheduler)
    watch.watchers.append(watcher)
    return functools.partial(watch.remove, watcher)


def _reduce_plain(cls: type) -> Callable[..., Any]:
    """`__reduce_ex__` by which copies and pickles are of class `cls`."""

    def reduce_ex(scheduler: Any, protocol: Any) -> Any:
        return _new, (cls,), dict(scheduler.__dict__)

    return reduce_ex


def _new(cls: type) -> Any:
    return object.__new__(cls)
