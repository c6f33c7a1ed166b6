"""Where in a forward a module stands, in shares of the network's FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_repr.capture.offload import is_offloaded
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.denoiser.layers import copy_to_meta, on_meta

Shares = dict[str, tuple[float, float]]


def flops_shares(model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any]) -> Shares:
    """For each module the shares of the FLOPs of a forward that are spent before it starts, and when it has ended.

    Counted on the meta device, with adapters: no weights are touched.

    Args:
        model: The network; with offloaded weights it is made anew from its config, without adapters.
        paths: Exact module paths.
        inputs: Keyword inputs of its forward, tensors on the meta device.

    Raises:
        ValueError: If one of the modules does not run.
    """
    twin, marks = on_meta(model) if is_offloaded(model) else copy_to_meta(model), dict[str, list[int]]()
    with ExitStack() as stack, eval_mode(twin), torch.no_grad(), FlopCounterMode(display=False) as flops:
        hooks = Hooks(stack)

        def mark(path: str) -> Callable[..., None]:
            return lambda *call: marks[path].append(flops.get_total_flops())

        known: dict[str, Any] = dict(twin.named_modules(remove_duplicate=False))
        for path in paths:
            marks[path] = []
            if path in known:
                hooks.before(known[path], mark(path))
                hooks.after(known[path], mark(path))
        twin(**inputs)
        total = max(flops.get_total_flops(), 1)
    missed = [path for path, found in marks.items() if not found]
    if missed:
        raise ValueError(f"Never called in a forward of {type(model).__name__} on the meta device: {missed}.")
    return {path: (found[0] / total, found[-1] / total) for path, found in marks.items()}


def without_data(value: Any) -> Any:
    """Arguments of a call with their tensors on the meta device: shapes alone."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, Mapping):
        return {name: without_data(part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(without_data(part) for part in value)
    return value


__all__ = ["Shares", "flops_shares", "without_data"]
