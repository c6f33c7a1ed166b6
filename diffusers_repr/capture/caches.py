"""Caches of activations between calls of a network: what is there, and what keeps the calls of its lanes apart.

Private ground, all of it: diffusers tells of a cache that was set by its function nothing but the hooks it leaves, and
lets nobody look at what it holds. A kind that is renamed is not found: it is not refused, and lanes mix. If states are
kept elsewhere than in `_state_cache` or `state`, the tests that compare lanes with networks of their own fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffusers_repr.denoiser.hooks import hooks_of_diffusers

# Names that diffusers' caches register their hooks under, one for each kind that is there.
_CACHES = (
    "faster_cache",
    "fbc",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)
# Those that hold nothing but states, of which a lane may have its own. FasterCache halves the batch into null and
# condition, the key-value cache goes by addresses of memory, SeaCache by the steps that the pipeline tells it.
_APART = ("fbc", "mag_cache", "pyramid_attention_broadcast", "taylorseer_cache")

# (object, its attribute that holds the state, how a new one is made)
_Place = tuple[Any, str, Callable[[], Any]]


def cache_kinds(model: nn.Module) -> tuple[str, ...]:
    """Kinds of caches on a network, by the names that diffusers registers their hooks under."""
    found = {_kind(name) for module in model.modules() for name in hooks_of_diffusers(module)} - {None}
    return tuple(kind for kind in _CACHES if kind in found)


def refuse_caches(model: nn.Module, why: str) -> None:
    """Raise ValueError if a network, or a part of it, uses activations of earlier calls.

    Args:
        model: The network.
        why: What comes of it, such as "which lanes would mix".

    Raises:
        ValueError: For a cache of diffusers, set by `enable_cache` or by its function.
    """
    name, enabled = type(model).__name__, bool(getattr(model, "is_cache_enabled", False))
    for path, module in model.named_modules():
        found = next((hook for hook in hooks_of_diffusers(module) if _kind(hook) is not None), None)
        if found is not None and not enabled:
            raise ValueError(
                f"{path or 'The network'} of this {name} caches activations between steps ({found}), {why}; remove "
                "its hooks, or load the network anew."
            )
    if enabled:
        raise ValueError(f"{name} caches activations between steps, {why}; call its disable_cache() first.")


def refuse_shared_caches(model: nn.Module, label: str) -> None:
    """Raise ValueError for a cache of which a further pass of the network cannot have its own state.

    Args:
        model: The network.
        label: What makes the pass.
    """
    shared = [kind for kind in cache_kinds(model) if kind not in _APART]
    if shared:
        refuse_caches(model, f"and what {shared[0]} keeps cannot be kept apart for the further pass of {label}")


class LaneCaches:
    """What the caches of networks hold for the lanes of one sampling run, beside what they hold for the caller."""

    def __init__(self) -> None:
        self._kinds: dict[nn.Module, tuple[str, ...]] = {}
        self._places: dict[nn.Module, list[_Place]] = {}
        self._kept: dict[tuple[nn.Module, str], list[Any]] = {}

    def clear(self) -> None:
        """Hold nothing."""
        self._kinds, self._places, self._kept = {}, {}, {}

    def are_on(self, model: nn.Module, label: str) -> bool:
        """Whether a network has caches; it is looked at once.

        Args:
            model: The network.
            label: What makes a further pass of it.

        Raises:
            ValueError: For caches that cannot be kept apart.
        """
        if model not in self._kinds:
            self._kinds[model] = cache_kinds(model)
        if self._kinds[model]:
            refuse_shared_caches(model, label)
        return bool(self._kinds[model])

    @contextmanager
    def of(self, model: nn.Module, lane: str) -> Iterator[bool]:
        """Inside, the caches of a network are those of a lane: empty at first, then as its last pass left them.

        Args:
            model: The network.
            lane: Name of the lane.

        Yields:
            Whether it is the lane's first pass.
        """
        places = self._places.setdefault(model, _places(model))
        first = (model, lane) not in self._kept
        states = [make() for *_, make in places] if first else self._kept[model, lane]
        own = [getattr(holder, name) for holder, name, _ in places]
        unnamed = [holder for holder, name, _ in places if name == "_state_cache" and not _named(holder)]
        for (holder, name, _), state in zip(places, states, strict=True):
            setattr(holder, name, state)
        for manager in unnamed:  # a network that no pipeline calls, and so none names the call of
            manager.set_context(_context(lane))
        try:
            yield first
        finally:
            self._kept[model, lane] = [getattr(holder, name) for holder, name, _ in places]
            for (holder, name, _), state in zip(places, own, strict=True):
                setattr(holder, name, state)
            for manager in unnamed:
                manager.set_context(None)


def replace_beneath_cache(module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Let a module compute `run(*args, **kwargs)` where it would run its own forward: a cache on it caches that.

    While `run` is at work the module's `forward` is its own, without the cache.

    Returns:
        A function that ends it.
    """
    hooks = hooks_of_diffusers(module)
    cache = next((hook for name, hook in hooks.items() if _kind(name) is not None), None)
    holder, name = (module, "forward") if cache is None else (cache.fn_ref, "original_forward")
    own = getattr(holder, name)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        outer = _set_forward(module, own)
        try:
            return run(*args, **kwargs)
        finally:
            _put_forward(module, outer)

    outer = module.__dict__.get("forward")
    setattr(holder, name, stand_in)

    def undo() -> None:
        if holder is module:
            _put_forward(module, outer)
        else:
            setattr(holder, name, own)

    return undo


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> Any:
    outer = module.__dict__.get("forward")
    module.forward = forward
    return outer


def _put_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def _kind(hook: str) -> str | None:
    return next((kind for kind in _CACHES if hook.startswith(kind)), None)


def _places(model: nn.Module) -> list[_Place]:
    found: dict[int, _Place] = {}
    for module in model.modules():
        for name, hook in hooks_of_diffusers(module).items():
            if _kind(name) is None:
                continue
            for attribute, value in vars(hook).items():
                if hasattr(value, "_state_cache"):  # states by the name of the call; several hooks share one
                    found[id(value)] = value, "_state_cache", dict
                elif attribute == "state":
                    found[id(hook)] = hook, "state", type(value)
    return list(found.values())


# A context is an object with a name, and up to diffusers 0.36 the name itself.


def _named(manager: Any) -> bool:
    return (manager._context if hasattr(manager, "_context") else manager._current_context) is not None


def _context(name: str) -> Any:
    from diffusers.hooks import hooks

    return hooks.CacheContext(name) if hasattr(hooks, "CacheContext") else name
