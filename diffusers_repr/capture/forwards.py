"""`replace_forward`: another forward of a module in the calls of one thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from diffusers_repr.denoiser.hooks import hooks_stay, this_thread

# (the module's own forward, arguments, keyword arguments) -> output
Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_RUNS = "_diffusers_repr_runs"  # thread -> what its calls run, on the function that stands in for a forward


def replace_forward(module: nn.Module, run: Replacement) -> Callable[[], None]:
    """Let calls of this thread be `run(forward, args, kwargs)`; those of other threads stay as they are.

    Returns:
        A function that ends it; with the last one ended the module has its own forward.
    """
    me = this_thread()
    with hooks_stay():
        stand_in = module.__dict__.get("forward")
        if not hasattr(stand_in, _RUNS):
            stand_in = _stand_in(module)
            module.forward = stand_in
        runs: dict[object, list[Replacement]] = getattr(stand_in, _RUNS)
        runs.setdefault(me, []).append(run)

    def undo() -> None:
        with hooks_stay():
            runs[me].remove(run)
            if not runs[me]:
                del runs[me]
            if not runs and module.__dict__.get("forward") is stand_in:
                own = stand_in.__dict__["own"]
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    return undo


def _stand_in(module: nn.Module) -> Callable[..., Any]:
    inner, runs = module.forward, dict[object, list[Replacement]]()

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        mine = runs.get(this_thread())
        return mine[-1](inner, args, kwargs) if mine else inner(*args, **kwargs)

    forward.__dict__.update({_RUNS: runs, "own": module.__dict__.get("forward")})
    return forward


__all__ = ["Replacement", "replace_forward"]
