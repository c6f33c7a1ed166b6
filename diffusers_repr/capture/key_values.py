"""`cached_key_values`: keys and values of cross-attention made once for a condition that stays the same over a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.capture.forwards import replace_forward

# Of an attention with fused projections `to_kv` alone is called, of another the other two.
_PROJECTIONS = ("to_k", "to_v", "to_kv")


@dataclass
class KeyValueCache:
    """What `cached_key_values` did.

    Attributes:
        layers: Paths of the projections of keys and values.
        computed: How often one was computed.
        reused: How often what it gave before was taken.
    """

    layers: tuple[str, ...]
    computed: int = 0
    reused: int = 0


@contextmanager
def cached_key_values(model: nn.Module) -> Iterator[KeyValueCache]:
    """Inside, every cross-attention projects a condition to keys and values once, bit for bit as it would each time.

    A condition is known by being the same tensor, unchanged: samplers pass one through all steps, the rows of the null
    condition in it. Another one, such as the rows that a lane of guidance takes of it, is projected as ever. Only
    calls of the thread that entered are looked at; with gradients nothing is kept. Weights must not change inside.

    Args:
        model: Any network whose cross-attention is diffusers' `Attention`; not compiled.

    Yields:
        What was computed, and how often it was not.

    Raises:
        RuntimeError: For a compiled network, where this would not act.
        ValueError: For one without cross-attention.
    """
    refuse_compiled(model, "Sample without this, or with the plain network.")
    found = _projections(model)
    if not found:
        raise ValueError(f"This {type(model).__name__} has no cross-attention whose keys and values could be kept.")
    cache = KeyValueCache(tuple(found))
    with ExitStack() as stack:
        for projection in found.values():
            stack.callback(replace_forward(projection, _Kept(cache)))
        yield cache


def can_cache(model: nn.Module) -> bool:
    """Whether `cached_key_values` would act on a network: it has cross-attention, and is not compiled."""
    try:
        refuse_compiled(model)
    except RuntimeError:
        return False
    return bool(_projections(model))


def _projections(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        if getattr(module, "is_cross_attention", False)
        for name in _PROJECTIONS
        if isinstance(getattr(module, name, None), nn.Module)
    }


@dataclass
class _Entry:
    given: weakref.ref[Tensor]
    state: tuple[Any, ...]
    output: Tensor


class _Kept:
    """What one projection gave; of inputs that are gone nothing is kept."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache, self.entries = cache, list[_Entry]()

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        # A tensor of inference mode does not tell when it is written to.
        if not alone or torch.is_grad_enabled() or args[0].is_inference():
            return forward(*args, **kwargs)
        (given,) = args
        state = (given._version, _autocast(given.device.type))
        self.entries = [entry for entry in self.entries if entry.given() is not None]
        for entry in self.entries:
            if entry.given() is given and entry.state == state:
                self.cache.reused += 1
                return entry.output
        output = forward(given)
        self.cache.computed += 1
        self.entries.append(_Entry(weakref.ref(given), state, output))
        return output


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


__all__ = ["KeyValueCache", "cached_key_values", "can_cache"]
