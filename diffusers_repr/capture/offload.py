"""Offloaded weights go back when a forward does not reach its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from diffusers_repr.denoiser.hooks import Turn, hooks_of_diffusers, hooks_stay

_READERS: WeakKeyDictionary[nn.Module, list[Turn]] = WeakKeyDictionary()  # a turn for each open block


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate or diffusers may move weights while the model runs."""
    # Both marks are private; accelerate and diffusers have no question for it. Without them weights stay on the device
    # after a forward that was left early. By the instance's own dict: `hasattr` of what a module lacks is slow, and
    # this is asked for every forward.
    return any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in model.modules())


def send_back(model: nn.Module) -> None:
    """Offload again what a forward brought in; no effect on weights that are where they belong.

    Both systems do it after a module has returned, which a module that is left by an exception never does.
    """
    # Private ground of both: neither has a call that takes weights back after an exception. If it goes, they stay
    # where the forward was left, until the next whole one.
    from diffusers.hooks.group_offloading import _GROUP_OFFLOADING

    for module in model.modules():
        for hook in _align_hooks(getattr(module, "_hf_hook", None)):
            if hook.offload and hasattr(hook, "tied_pointers_to_remove"):  # set when the module first runs
                hook.post_forward(module, None)
        group = hooks_of_diffusers(module).get(_GROUP_OFFLOADING)
        if group is not None:
            group.group.offload_()


@contextmanager
def only_reader(model: nn.Module) -> Iterator[None]:
    """Inside, no other thread may read the model: a forward that ends would take the weights from another's.

    Raises:
        RuntimeError: If another thread is reading it.
    """
    turn = Turn(taken=True)
    with hooks_stay():
        readers = _READERS.setdefault(model, [])
        if not all(other() for other in readers):
            raise RuntimeError(
                f"Another thread is reading this {type(model).__name__}, whose weights are offloaded: they are moved "
                "when a forward ends, also under a forward of another thread. Read it from one thread at a time, or "
                "load it without offloading."
            )
        readers.append(turn)
    try:
        yield
    finally:
        readers.remove(turn)


def _align_hooks(hook: Any) -> Iterator[Any]:
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _align_hooks(part)
    elif isinstance(hook, AlignDevicesHook):
        yield hook
