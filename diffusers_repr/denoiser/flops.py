"""Where in a forward a module stands, in shares of the network's FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.denoiser.layers import example_inputs, on_meta


def flops_shares(denoiser: Denoiser, paths: Iterable[str], size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """For each module the shares of the FLOPs of a forward that are spent before it starts, and when it has ended.

    Counted on the meta device: no weights are touched. Text models are counted with the text length of their
    pipeline's default.

    Args:
        denoiser: Of any family.
        paths: Exact module paths.
        size: (H, W) of what the network takes.

    Raises:
        ValueError: If one of them does not run.
    """
    model, marks = on_meta(denoiser.model), dict[str, list[int]]()
    inputs = example_inputs(denoiser.family, denoiser.config, size, denoiser.schedule, 1)
    with ExitStack() as stack, eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as flops:
        hooks = Hooks(stack)

        def mark(path: str) -> Callable[..., None]:
            return lambda *call: marks.setdefault(path, []).append(flops.get_total_flops())

        known: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        for path in dict.fromkeys(paths):
            if path in known:
                hooks.before(known[path], mark(path))
                hooks.after(known[path], mark(path))
            marks[path] = []
        model(**inputs)
        total = max(flops.get_total_flops(), 1)
    missed = [path for path, found in marks.items() if not found]
    if missed:
        raise ValueError(f"Never called in a forward of {type(model).__name__} on the meta device: {missed}.")
    return {path: (found[0] / total, found[-1] / total) for path, found in marks.items()}


__all__ = ["flops_shares"]
