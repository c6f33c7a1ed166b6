"""`EMA`: one exponential moving average of what an objective names, by foreach kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusers_repr.objectives import Objective
from diffusers_repr.training.tensors import full, is_sharded, local, put


class EMA:
    """Moving average of the trained parameters and floating buffers of `objective.ema_modules()`.

    After update n (from 0) `average += (1 - decay_n) (weights - average)`, `decay_n = decay`, or with `warmup`
    `min(decay, (1 + n) / (10 + n))`, 0 at the first update. Updates follow optimizer steps that took place. Sharded
    parameters are averaged shard by shard.

    Args:
        objective: On its device, prepared if it is to be sharded.
        decay: In [0, 1]: 0 keeps the weights themselves, 1 the first ones.
        warmup: Whether early averages forget faster.

    Attributes:
        updates: How many took place (the skipped ones included, which change nothing but this count's warm-up).
        shadow: Name in the objective -> averaged tensor, float32 or wider.

    Raises:
        ValueError: For a decay outside [0, 1], or nothing to average.
    """

    def __init__(self, objective: Objective, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"The decay of a moving average lies in [0, 1]; got {decay}.")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.source = dict(averaged_tensors(objective))
        if not self.source:
            raise ValueError("Nothing to average: no module of ema_modules() has a trained parameter.")
        self.shadow = {name: float_copy(tensor) for name, tensor in self.source.items()}
        self._sharded = any(is_sharded(tensor) for tensor in self.source.values())
        self._pairs = None if self._sharded else self._local_pairs()

    def next_decay(self) -> float:
        """The decay of the coming update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0

    @torch.no_grad()
    def step(self, took_place: Tensor | bool = True) -> None:
        """Update after an optimizer step.

        Args:
            took_place: Whether it did; a tensor is not read back, so that the device is not waited for.
        """
        if took_place is False:
            return
        weight = 1 - self.next_decay()
        shadow, source = self._pairs or self._local_pairs()
        if any(a.dtype != b.dtype for a, b in zip(shadow, source, strict=True)):
            source = [b.to(a.dtype) for a, b in zip(shadow, source, strict=True)]
        # torch's private operators on lists of tensors, as its own optimizers call them: a kernel for all tensors in
        # place of one for each. If they go, a loop over the pairs does the same, more slowly.
        if took_place is True:
            torch._foreach_lerp_(shadow, source, weight)
        else:
            change = torch._foreach_sub(source, shadow)
            torch._foreach_mul_(change, took_place.to(torch.float32) * weight)
            torch._foreach_add_(shadow, change)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Make the average the weights themselves; how fast it moves on from there stays as it was."""
        for mean, value in zip(*(self._pairs or self._local_pairs()), strict=True):
            mean.copy_(value)

    def averages(self, path: str) -> dict[str, Tensor]:
        """The averaged tensors of a submodule by their names in it; not copies.

        Args:
            path: Of the submodule in the objective.

        Raises:
            ValueError: If they are sharded: no process has them whole.
        """
        if self._sharded:
            raise ValueError("The moving average is sharded over the processes (FSDP), and no process has it whole.")
        return {k.removeprefix(f"{path}."): v for k, v in self.shadow.items() if k.startswith(f"{path}.")}

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return [local(t) for t in self.shadow.values()], [local(t) for t in self.source.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Full tensors on the CPU by name; every process must call it."""
        return {name: full(tensor) for name, tensor in self.shadow.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over full tensors.

        Raises:
            KeyError: If one is missing.
        """
        for name, tensor in self.shadow.items():
            put(tensor, state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the objective holds the average; its own weights come back after."""
        kept = {name: tensor.detach().clone() for name, tensor in self.source.items()}
        with torch.no_grad():
            for name, tensor in self.source.items():
                tensor.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.source.items():
                    tensor.copy_(kept[name])


def averaged_tensors(objective: Objective) -> Iterator[tuple[str, Tensor]]:
    """Name in the objective and tensor, of parameters that are trained and of persistent floating buffers."""
    stored = set(objective.state_dict())
    seen: set[int] = set()
    for prefix, module in objective.ema_modules().items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}", parameter
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and f"{prefix}.{name}" in stored:
                yield f"{prefix}.{name}", buffer


def float_copy(tensor: Tensor) -> Tensor:
    """A copy, float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
