"""Hooks of modules, all that this library sets: they act in the calls of whoever set them, and in no others.

A forward hook of torch fires in every thread that calls the module, and networks are shared: by the pipelines of a
server, by readers beside a sampler. So each hook here asks first whether the call is its own; in the calls of other
threads it does nothing. Hooks are set and removed by one thread at a time, for torch numbers them without a lock.

What may happen in a thread that sets none: it calls a hook of another thread that is just being set or removed, with
too few arguments, which makes no difference to a hook that does nothing. Only what torch does after an `Exception`
goes through the hooks one by one, and would fail if one were set meanwhile; so what leaves a forward early here is a
`BaseException`, of which torch tells no hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# (module, args, kwargs) -> None, or (args, kwargs) to go on with
BeforeHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
# (module, args, kwargs, output) -> None, or what is returned instead
AfterHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
# Whether the call under way is one to act in.
Acts = Callable[[], bool]

_LOCK = threading.RLock()
_HERE = threading.local()


def this_thread() -> object:
    """What stands for the running thread; a thread's number may be given out again after its end, this is not."""
    try:
        return _HERE.token
    except AttributeError:
        _HERE.token = object()
        return _HERE.token


class Turn:
    """Which thread hooks act for; none until one takes it.

    Args:
        taken: Whether it is the running thread's from the start.

    Example:
        >>> turn = Turn()
        >>> turn(), turn.take(), turn()
        (False, None, True)
    """

    def __init__(self, *, taken: bool = False) -> None:
        self._holder: object | None = this_thread() if taken else None

    def __call__(self) -> bool:
        """Whether it is the running thread's."""
        return self._holder is this_thread()

    def take(self, refusal: str | None = None) -> None:
        """It is the running thread's from now on.

        Args:
            refusal: Message of the error if another thread has it; None takes it over.

        Raises:
            RuntimeError: If another thread has it.
        """
        with _LOCK:
            if refusal is not None and self._holder is not None and not self():
                raise RuntimeError(refusal)
            self._holder = this_thread()

    def end(self) -> None:
        """It is nobody's."""
        self._holder = None


class Hooks:
    """Sets hooks on modules; a stack removes them.

    Args:
        stack: At its end the hooks are gone.
        acts: In which calls they act; None: in those of the thread that makes this object.
    """

    def __init__(self, stack: ExitStack, acts: Acts | None = None) -> None:
        self._stack, self._acts = stack, Turn(taken=True) if acts is None else acts

    def before(self, module: nn.Module, hook: BeforeHook, *, prepend: bool = False) -> None:
        """Call `hook` before the module's forward; first of all hooks with `prepend`."""
        self._stack.callback(remove_hook, hook_before(module, hook, self._acts, prepend=prepend))

    def after(self, module: nn.Module, hook: AfterHook, *, prepend: bool = False, always_call: bool = False) -> None:
        """Call `hook` after the module's forward; with `always_call` also after an `Exception`, without an output."""
        handle = hook_after(module, hook, self._acts, prepend=prepend, always_call=always_call)
        self._stack.callback(remove_hook, handle)


def hook_before(module: nn.Module, hook: BeforeHook, acts: Acts, *, prepend: bool = False) -> RemovableHandle:
    """As `Hooks.before`, until `remove_hook` is called with the result."""
    with _LOCK:
        return module.register_forward_pre_hook(_Hook(hook, acts), prepend=prepend, with_kwargs=True)


def hook_after(
    module: nn.Module, hook: AfterHook, acts: Acts, *, prepend: bool = False, always_call: bool = False
) -> RemovableHandle:
    """As `Hooks.after`, until `remove_hook` is called with the result."""
    with _LOCK:
        return module.register_forward_hook(
            _Hook(hook, acts), prepend=prepend, with_kwargs=True, always_call=always_call
        )


def remove_hook(handle: RemovableHandle) -> None:
    """Take a hook away."""
    with _LOCK:
        handle.remove()


@contextmanager
def hooks_stay() -> Iterator[None]:
    """Inside, no other thread sets or removes a hook of ours: for copies of a module."""
    with _LOCK:
        yield


class _Hook:
    """A hook that does nothing in the calls of others, and nothing in copies and pickles of its module."""

    def __init__(self, run: Callable[..., Any], acts: Acts) -> None:
        self._run, self._acts = run, acts

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        # Asked in a graph that is compiled too: whose call it is, is one of its guards.
        return self._run(module, *given) if self._acts() else None

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _idle, ()


def _idle() -> Callable[..., None]:
    return _does_nothing


def _does_nothing(module: nn.Module, *given: Any) -> None:
    """What a hook is in a copy of its module."""


def count_hooks(module: nn.Module) -> tuple[int, int, int]:
    """Number of hooks on a module: forward, before the forward, backward.

    Private ground: torch has no question for what is set on a module. If the dicts are renamed this fails, and with it
    the contract testers that ask whether hooks were left behind.
    """
    return len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)


def clear_hooks(module: nn.Module) -> None:
    """Take all forward hooks off a module and its parts, such as those that a copy brought along.

    Private ground: torch removes a hook by the handle of whoever set it, and a copy has none. If the two dicts are
    renamed this fails, and nothing is copied.
    """
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()


def hooks_of_diffusers(module: nn.Module) -> dict[str, Any]:
    """Hooks that diffusers set on a module, by the names it registers them under.

    Private ground: diffusers has no question for them (caches of activations, offloaded or exchanged weights). If
    `_diffusers_hook` is renamed none is found: what cannot be guided or read is not refused, and offloaded weights
    stay where a forward that was left early had brought them.
    """
    return getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})


__all__ = [
    "Hooks",
    "Turn",
    "clear_hooks",
    "count_hooks",
    "hook_after",
    "hook_before",
    "hooks_of_diffusers",
    "hooks_stay",
    "remove_hook",
    "this_thread",
]
