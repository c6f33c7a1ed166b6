"""What torch's compiler leaves on a module: the one place that knows its two private names.

torch has no public way to either. If `_orig_mod` goes, a network in the wrapper of `torch.compile(model)` is of an
unknown class: it has no family and no config, its weights have another hash, and its pipeline is not recognised. If
`_compiled_call_impl` goes, a module after `model.compile()` looks plain, and its hooks are ignored in silence. Tests
compile in both ways to see it.
"""

from __future__ import annotations

from typing import TypeVar

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


__all__ = ["is_compiled_in_place", "plain_module", "pop_compiled_call", "put_compiled_call"]
