"""`GradientTape`: the gradient of a loss of named layers or of the output, with respect to a network's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.streams import image_stream

# Layer path -> what it returned, and the network's output where the loss asks for it => loss.
Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


class GradientStop(Exception):
    """The gradient is known and nothing else of the forward is wanted."""


class GradientTape:
    """One forward with gradients in scope: parameters frozen, the loss differentiated as soon as it can be.

    Once all layers are read the loss is differentiated inside the forward, which goes on without gradients: what lies
    behind the last layer costs no memory. A loss of the output is differentiated by `finish`.

    Args:
        model: The network.
        layers: All layers that any loss may read, by exact path.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, tuple(layers)
        self.gradient: Tensor | None = None
        self._loss: Loss | None = None
        self._wanted: tuple[str, ...] = ()
        self._found: dict[str, Tensor] = {}
        self._x: Tensor | None = None
        self._at_output = self._stop = False
        self._undo = ExitStack()

    def install(self, stack: ExitStack) -> None:
        """Set the hooks; they do nothing but between `begin` and `end`. The stack removes them."""
        modules = dict(self.model.named_modules())
        for path in self.layers:
            stack.callback(modules[path].register_forward_hook(self._hook(path)).remove)

    def begin(
        self, x: Tensor, loss: Loss, layers: Sequence[str], *, at_output: bool, stop: bool, checkpoint: bool = False
    ) -> None:
        """Switch gradients on, for a forward whose input is made from `x`.

        Args:
            x: A leaf that requires its gradient.
            loss: From the layers read, and the output if `at_output`, to a scalar.
            layers: What it reads.
            at_output: Wait for `finish`.
            stop: Leave the forward by `GradientStop` once the gradient is known.
            checkpoint: Recompute activations in the backward pass, where the network can.

        Raises:
            RuntimeError: In inference mode, where nothing can be differentiated.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Gradients do not exist under torch.inference_mode(); use torch.no_grad() instead.")
        self.gradient, self._x, self._loss = None, x, loss
        self._wanted, self._at_output, self._stop = tuple(layers), at_output, stop
        self._found = {}
        undo = self._undo = ExitStack()
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        if checkpoint:
            _checkpointing(self.model, undo)
        torch.set_grad_enabled(True)

    def finish(self, output: Any) -> None:
        """Differentiate a loss of the output.

        Raises:
            RuntimeError: If a layer that the loss reads did not run.
        """
        if self.gradient is not None:
            return
        missed = [path for path in self._wanted if path not in self._found]
        if missed:
            raise RuntimeError(f"Layers {missed} were not called in the forward; the guidance has nothing to read.")
        self._differentiate(output)

    def end(self) -> None:
        """Gradient mode, the parameters' flags and checkpointing as they were."""
        self._loss, self._found, self._x = None, {}, None
        self._undo.close()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # With checkpoints the backward pass calls modules once more; the loss is taken by then.
            if self._loss is None or self.gradient is not None or path not in self._wanted or path in self._found:
                return
            self._found[path] = image_stream(module, output, path)
            if len(self._found) == len(self._wanted) and not self._at_output:
                self._differentiate(None)
                torch.set_grad_enabled(False)
                if self._stop:
                    raise GradientStop

        return hook

    def _differentiate(self, output: Any) -> None:
        loss_of, x = self._loss, self._x
        assert loss_of is not None
        assert x is not None
        loss = loss_of(self._found, output)
        self._loss = None  # hooks that the backward pass runs again find nothing to do
        if not loss.requires_grad:
            self.gradient = torch.zeros_like(x)
        else:
            (found,) = torch.autograd.grad(loss, x, allow_unused=True)
            self.gradient = torch.zeros_like(x) if found is None else found
        self._found = {}


def _checkpointing(model: nn.Module, undo: ExitStack) -> None:
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; leave checkpoint=False.")
    if getattr(model, "is_gradient_checkpointing", False):
        return
    enable: Any = getattr(model, "enable_gradient_checkpointing")  # noqa: B009  of ModelMixin
    disable: Any = getattr(model, "disable_gradient_checkpointing")  # noqa: B009
    undo.callback(disable)
    enable()


__all__ = ["GradientStop", "GradientTape", "Loss"]
