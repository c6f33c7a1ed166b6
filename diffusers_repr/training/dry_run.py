"""`describe_run`: what a run would be, before it costs anything: recipe, parameters, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffusers_repr.config.recipe import to_yaml
from diffusers_repr.objectives import Objective
from diffusers_repr.training.assumed import AssumedData
from diffusers_repr.training.config import TrainingConfig


def describe_run(objective: Objective, data: Any, config: TrainingConfig, recipe: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML, then comments with parameter counts and a memory estimate.

    The memory is that of one process in float32 arithmetic: weights, gradients, AdamW's two moments, the moving
    average; frozen parts; and the activations that one micro-batch keeps for its backward pass, measured on one sample
    and multiplied.

    Args:
        objective: On the CPU; beside `AssumedData` on the meta device, all or in part: it gets memory without values.
        data: Map-style; None, or a stream, leaves the activations out. `AssumedData` says what it took for granted.
        config: The loop's settings.
        recipe: What to print.
    """
    trained = [p for p in objective.parameters() if p.requires_grad]
    averaged = [p for m in objective.ema_modules().values() for p in m.parameters() if p.requires_grad]
    frozen = [p for part in objective.frozen.values() for p in _parameters(part)]
    frozen += [p for p in objective.parameters() if not p.requires_grad]
    moving = 16 * _count(trained) + 4 * _count(averaged)
    lines = [to_yaml(dict(recipe)).rstrip()]
    for name, child in objective.named_children():
        if count := _count(child.parameters()):
            lines.append(f"# {name}: {count:,} parameters ({type(child).__name__})")
    lines += [f"# saved: {artifact}" for artifact in objective.artifacts()]
    lines += [f"# assumed: {line}" for line in getattr(data, "assumed", ())]
    lines.append(f"# trained: {_count(trained):,} parameters; frozen: {_count(frozen):,}")
    lines.append(
        f"# weights, gradients, optimizer and average: {_size(moving)}; frozen parts: {_size(_bytes(frozen))}"
    )
    if isinstance(data, AssumedData) and any(p.is_meta for p in objective.parameters()):
        objective.to_empty(device="cpu")  # pages that nobody writes to cost nothing
    if hasattr(data, "__len__") and len(data):
        kept = activation_bytes(objective, data) * config.train_batch_size
        lines.append(
            f"# activations of a micro-batch of {config.train_batch_size}: about {_size(kept)} in float32"
            f"{' without gradient checkpointing' if config.gradient_checkpointing else ''}"
        )
    return "\n".join(lines)


def activation_bytes(objective: Objective, data: Any) -> int:
    """Bytes that the loss of one sample keeps for the backward pass, weights left out; the random state stays."""
    seen = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sample = data.batch([0, 0]) if hasattr(data, "batch") else default_collate([data[0], data[0]])
        batch = data.on_device(sample)
        for phase in objective.phases:  # all are kept until the end, so that no memory is given out twice
            _ = objective.train()({**batch, "micro": 0}, phase=phase)
    return total // 2


def _parameters(part: Any) -> list[Tensor]:
    module = part if isinstance(part, torch.nn.Module) else getattr(part, "module", None)
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
