"""One optimizer step: clip, AdamW, moving average; skipped where loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_repr.training.ema import EMA
from diffusers_repr.training.tensors import full, is_sharded


class Update:
    """Applies the gradients of one phase.

    The clip's factor goes into the fused AdamW, which reads every gradient once; whether the step takes place is
    decided on the device, so nothing waits for it. Sharded parameters and fp16's scaler take accelerate's own way.

    Args:
        accelerator: The run's.
        optimizer: As prepared.
        max_grad_norm: The gradient's norm over all processes is clipped to this; None leaves it.

    Attributes:
        waits: Whether the host reads if the step takes place, as it does where reading costs nothing: on a CPU.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, max_grad_norm: float | None) -> None:
        self.accelerator, self.optimizer, self.max_grad_norm = accelerator, optimizer, max_grad_norm
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = any(is_sharded(p) for p in self.params)
        self.waits = all(p.device.type == "cpu" for p in self.params)
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self.fused = not self.sharded and accelerator.scaler is None and bool(self.inner.defaults.get("fused"))

    def step(self, lr: float, loss: Tensor, ema: EMA | None) -> tuple[Tensor, Tensor]:
        """Step and reset the gradients.

        Args:
            lr: Learning rate of every group; times its own `lr_scale` where it has one.
            loss: Scalar of this process, for whether it is finite.
            ema: Moving average to be updated, if the phase updates it.

        Returns:
            `(norm, finite)`: the gradient's norm before clipping, and whether the step took place; 0-dim tensors.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm, finite = self._fused(loss) if self.fused else self._plain(loss)
        if ema is not None:
            ema.step(bool(finite) if self.waits else finite)
        self.inner.zero_grad(set_to_none=True)
        return norm, finite

    def _finite(self, norm: Tensor, loss: Tensor) -> Tensor:
        """The same on all processes: one that fails stops all."""
        finite = norm.isfinite() & loss.detach().isfinite()
        if self.accelerator.num_processes > 1:
            flag = finite.to(torch.float32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
            finite = flag > 0.5
        return finite

    def _fused(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        norm = total_norm([p.grad for p in self.params if p.grad is not None])
        finite = self._finite(norm, loss)
        if self.waits and not finite:
            return norm, finite
        # `grad_scale` and `found_inf` are torch's own way from its GradScaler into a fused optimizer, which divides by
        # the one and skips by the other; no argument is public. If they go, steps are neither clipped nor skipped.
        if self.max_grad_norm is not None:
            self.inner.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0).to(torch.float32)
        if not self.waits:
            self.inner.found_inf = (~finite).to(torch.float32)
        try:
            self.inner.step()
        finally:
            self.inner.__dict__.pop("grad_scale", None)
            self.inner.__dict__.pop("found_inf", None)
        return norm, finite

    def _plain(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = total_norm(grads)
        finite = self._finite(norm, loss)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.max_grad_norm, norm)
        if self.accelerator.scaler is not None:  # it skips by itself, and lowers its scale
            self.optimizer.step()
        elif bool(finite):
            self.inner.step()
        return norm, finite


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, 0-dim, over all shards."""
    if not grads:
        raise RuntimeError("No parameter got a gradient; the loss does not depend on what the optimizer trains.")
    norm = torch.nn.utils.get_total_norm(grads)
    return full(norm).to(grads[0].device) if is_sharded(norm) else norm
