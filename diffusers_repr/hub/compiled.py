"""What torch's compiler leaves on a module: the one place that knows its two private names.

torch has no public way to either. If `_orig_mod` goes, a network in the wrapper of `torch.compile(model)` is of an
unknown class: it has no family and no config, its weights have another hash, and its pipeline is not recognised. If
`_compiled_call_impl` goes, a module after `model.compile()` looks plain, and its hooks are ignored in silence. Tests
compile in both ways to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M")
_IN_PLACE = "_compiled_call_impl"


def plain_module(module: M) -> M:
    """The module itself, also where it stands in the wrapper of `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: it ignores hooks that come after."""
    return getattr(module, _IN_PLACE, None) is not None


def pop_compiled_call(module: nn.Module) -> object:
    """Take the compiled call off a module, so that torch takes the plain one; None where there is none."""
    return module.__dict__.pop(_IN_PLACE, None)


def put_compiled_call(module: nn.Module, call: object) -> None:
    """Put back what `pop_compiled_call` took off."""
    if call is not None:
        setattr(module, _IN_PLACE, call)


def wrap_compiled_call(module: nn.Module, run: Callable[..., Any]) -> Callable[[], None]:
    """Let calls of a module that is compiled in place be `run(compiled, args, kwargs)`.

    Returns:
        A function that puts the compiled call back; it does nothing if another was set meanwhile.
    """
    own: Any = getattr(module, _IN_PLACE)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(own, args, kwargs)

    setattr(module, _IN_PLACE, call)

    def undo() -> None:
        if getattr(module, _IN_PLACE, None) is call:
            setattr(module, _IN_PLACE, own)

    return undo


def plain_path(path: str) -> str:
    """The path of a module as it would be without compiled wrappers on the way.

    Example:
        >>> plain_path("blocks.1._orig_mod.attn")
        'blocks.1.attn'
    """
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


__all__ = [
    "is_compiled_in_place",
    "plain_module",
    "plain_path",
    "pop_compiled_call",
    "put_compiled_call",
    "wrap_compiled_call",
]
