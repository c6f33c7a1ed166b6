"""`SelfTeacher`: a moving average of a network in training that teaches it (SRA)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.hooks import clear_hooks
from diffusers_repr.objectives.artifacts import merge_lora


class SelfTeacher:
    """`average += (1 - decay) (weights - average)` after each step, from the first weights on.

    It is apart from the run's moving average, whose decay is smaller at first (`ema_warmup`). Adapters of the network
    (LoRA) enter merged into its weights.

    Args:
        network: What is trained; copied.
        decay: In [0, 1].

    Attributes:
        module: The average: no hooks, no gradients, eval mode, float32 or wider.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.module = decay, frozen_copy(network)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the weights of the network."""
        weights = merge_lora({name: _whole(value) for name, value in network.state_dict().items()})
        means, values = [], []
        for name, mean in self.module.state_dict().items():
            if mean.is_floating_point():
                means.append(mean)
                values.append(weights[name].to(mean))
            else:
                mean.copy_(weights[name])
        torch._foreach_lerp_(means, values, 1 - self.decay)  # as the run's own average does

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name: what a checkpoint keeps."""
        return self.module.state_dict()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a network that nothing hangs on: no hooks, no gradients, eval mode, float32 or wider."""
    twin: Any = copy.deepcopy(model)
    clear_hooks(twin)
    if hasattr(twin, "disable_gradient_checkpointing") and getattr(twin, "_supports_gradient_checkpointing", False):
        twin.disable_gradient_checkpointing()
    # Half precision would round the small steps of an average away.
    for parameter in [*twin.parameters(), *twin.buffers()]:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return twin.eval().requires_grad_(False)


def _whole(value: Tensor) -> Tensor:
    """Not sharded by FSDP."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


__all__ = ["SelfTeacher", "frozen_copy"]
