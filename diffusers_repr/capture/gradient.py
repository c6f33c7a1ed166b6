"""`GradientTape`: the gradient of a loss of named layers or of the output, with respect to a network's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.hooks import AfterHook, Hooks, Turn, hooks_of_diffusers

# (layer path -> what it returned, the network's output where the loss asks for it, x) => loss; all of them leaves.
Loss = Callable[[Mapping[str, Tensor], Tensor | None, Tensor], Tensor]

_HALF_EXPONENT = -4  # of the largest gradient that enters a float16 network: amid its range, 2^-24 to 2^16


class GradientStop(BaseException):  # see `denoiser.hooks`
    """The gradient is known and nothing else of the forward is wanted.

    Attributes:
        path: The layer at whose end the forward was left.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class GradientTape:
    """One forward with gradients in scope: parameters frozen, the loss differentiated as soon as it can be.

    Once all layers are read the loss is differentiated inside the forward, which goes on without gradients: what lies
    behind the last layer costs no memory. A loss of the output is differentiated by `finish`.

    Args:
        model: The network.
        layers: All layers that any loss may read, by exact path.

    Attributes:
        gradient: Of the newest pass, in the shape of `x` and float32 or wider; None until it is known.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, tuple(layers)
        self.gradient: Tensor | None = None
        self._loss: Loss | None = None
        self._wanted: tuple[str, ...] = ()
        self._found: dict[str, Tensor] = {}
        self._x: Tensor | None = None
        self._at_output = self._stop = False
        self._mode: bool | None = None  # gradient mode to come back to; None between passes
        self._interrupted = False  # the newest pass was left with gradients on
        self._undo = ExitStack()
        self._turn = Turn()  # the thread of the pass

    def install(self, stack: ExitStack) -> None:
        """Set the hooks; they do nothing but between `begin` and `end`, in that thread. The stack removes them."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        hooks = Hooks(stack, self._turn)
        for path in self.layers:
            hooks.after(modules[path], self._hook(path))
        stack.callback(self._close, torch.is_grad_enabled())

    def begin(
        self,
        x: Tensor,
        loss: Loss,
        layers: Sequence[str],
        *,
        at_output: bool,
        stop: bool,
        checkpoint: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        """Switch gradients on, for a forward whose input is made from `x`.

        Args:
            x: A leaf that requires its gradient.
            loss: From the layers read, the output (None unless `at_output`) and `x` to a scalar. It is given copies
                in float32 or wider.
            layers: What it reads.
            at_output: Wait for `finish`.
            stop: Leave the forward by `GradientStop` once the gradient is known.
            checkpoint: Recompute activations in the backward pass, where the network can.
            modules: What the loss calls: in eval mode and frozen until `end`.

        Raises:
            RuntimeError: In inference mode, where nothing can be differentiated.
            ValueError: If the network has no checkpointing.
        """
        refuse_inference_mode()
        self.abandon()
        self._turn.take()
        self.gradient, self._x, self._loss = None, x, loss
        self._wanted, self._at_output, self._stop = tuple(layers), at_output, stop
        self._found = {}
        with ExitStack() as undo:
            undo.enter_context(frozen(self.model, *modules))
            undo.enter_context(eval_mode(*modules))
            if checkpoint:
                undo.enter_context(checkpointing(self.model))
            self._undo = undo.pop_all()
        self._mode, self._interrupted = torch.is_grad_enabled(), False
        torch.set_grad_enabled(True)

    def finish(self, output: Tensor) -> None:
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
        """Gradient mode, the modules' flags and checkpointing as they were."""
        if self._mode is not None:
            torch.set_grad_enabled(self._mode)
            self._mode = None
        self._loss, self._found, self._x = None, {}, None
        self._turn.end()
        self._undo.close()

    def abandon(self) -> None:
        """End a pass that an interrupt left, of which torch tells no hook: as `end`, but in the mode it is called in.

        Who was interrupted has come back to a gradient mode of its own by now.
        """
        self._interrupted |= self._mode is not None
        self._mode = None
        self.end()

    def _close(self, mode: bool) -> None:
        """No pass is left open; after an interrupt, gradients are on or off as when the hooks were set."""
        self.abandon()
        if self._interrupted:
            torch.set_grad_enabled(mode)

    def _hook(self, path: str) -> AfterHook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # With checkpoints the backward pass calls modules once more; the loss is taken by then.
            if self._loss is None or path not in self._wanted or path in self._found:
                return
            self._found[path] = block_output(module, output, path)
            if len(self._found) == len(self._wanted) and not self._at_output:
                self._differentiate(None)
                torch.set_grad_enabled(False)
                if self._stop:
                    raise GradientStop(path)

        return hook

    def _differentiate(self, output: Tensor | None) -> None:
        loss, x, found = self._loss, self._x, self._found
        assert loss is not None
        assert x is not None
        self._loss, self._found = None, {}  # hooks that the backward pass runs again find nothing to do
        self.gradient = gradient_of(loss, x, found, output)


def gradient_of(loss: Loss, x: Tensor, features: Mapping[str, Tensor], output: Tensor | None = None) -> Tensor:
    """Gradient of a loss of what a network made of `x`.

    The chain rule in two parts: through the loss in float32 or wider, then through the network in its own dtype.
    Between them gradients for float16 are scaled by a power of two, so that those of a mean over many pixels do not
    vanish.

    Args:
        loss: As for `GradientTape.begin`.
        x: The leaf.
        features: Layer path -> tensor.
        output: Of the network, or None.

    Returns:
        Shape of `x`, float32 or wider.

    Raises:
        RuntimeError: If the loss does not depend on `x`.
    """
    parts = [*features.values(), *([] if output is None else [output])]
    own, *leaves = (_leaf(part) for part in (x, *parts))
    # Inside a checkpointed block, what is saved for the loss is not the block's to recompute.
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        value = loss(dict(zip(features, leaves, strict=False)), None if output is None else leaves[-1], own)
        if not value.requires_grad:
            raise RuntimeError(NO_GRAPH)
        gradient, *grads = torch.autograd.grad(value, [own, *leaves], allow_unused=True)
    through = [(part, g) for part, g in zip(parts, grads, strict=True) if g is not None and part.requires_grad]
    if through:
        scale = half_scale(through)
        (found,) = torch.autograd.grad(
            [part for part, _ in through], x, [(scale * g).to(part.dtype) for part, g in through], allow_unused=True
        )
        if found is not None:
            found = found.to(own.dtype) / scale
            gradient = found if gradient is None else gradient + found
    if gradient is None:
        raise RuntimeError(NO_GRAPH)
    return gradient


NO_GRAPH = (
    "The energy does not depend on x_t: there is nothing to differentiate. Compute it from the features, x0 or the "
    "noisy input that it is given, without detach(), item() or torch.no_grad()."
)


def refuse_inference_mode() -> None:
    """Raise RuntimeError in inference mode, where nothing can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Gradients do not exist under torch.inference_mode(); use torch.no_grad() instead.")


def refuse_swapped_weights(model: nn.Module) -> None:
    """Raise ValueError for weights that are exchanged while the network runs: the backward pass would find others."""
    for path, module in model.named_modules():
        # Private: diffusers does not say whether weights are swapped. If a name changes, the backward pass meets the
        # error of torch about tensors that were freed or changed, in place of this one.
        hooks = hooks_of_diffusers(module)
        found = next((name for name in ("group_offloading", "layerwise_casting") if name in hooks), None)
        if found is not None:
            raise ValueError(
                f"Gradients cannot pass {path or type(model).__name__}: diffusers' {found.replace('_', ' ')} replaces "
                "its weights once it has run, before the backward pass needs them. Use "
                "pipe.enable_model_cpu_offload(), or a dtype for the whole network."
            )


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires its gradient; by name, since offloading puts other tensors in their place."""
    # torch's own dict of a module, private: the public `named_parameters` gives tensors and not where they are held.
    flagged = [
        (part, name)
        for module in modules
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        _require(flagged, False)
        yield
    finally:
        _require(flagged, True)


def _require(flagged: Sequence[tuple[nn.Module, str]], value: bool) -> None:
    for part, name in flagged:
        parameter = part._parameters[name]
        assert parameter is not None
        parameter.requires_grad_(value)


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of a diffusers model inside; left as it is where it is on.

    Raises:
        ValueError: If the model has none.
    """
    check_checkpointing(model)
    if getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable: Any = getattr(model, "enable_gradient_checkpointing")  # noqa: B009  of ModelMixin
    disable: Any = getattr(model, "disable_gradient_checkpointing")  # noqa: B009
    try:
        enable()
        yield
    finally:
        disable()


def check_checkpointing(model: nn.Module) -> None:
    """Raise ValueError unless activations can be recomputed."""
    # diffusers has no public question for it; without it `enable_gradient_checkpointing` says the same less clearly.
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; leave checkpoint=False.")


def _leaf(value: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to(wide).requires_grad_(True)


def half_scale(through: Sequence[tuple[Tensor, Tensor]]) -> float | Tensor:
    """Power of two that brings the largest gradient amid the range of float16; 1 for other networks."""
    if all(part.dtype != torch.float16 for part, _ in through):
        return 1.0
    largest = torch.stack([gradient.abs().amax() for _, gradient in through]).amax()
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(torch.ones_like(largest), _HALF_EXPONENT - exponent)


__all__ = [
    "NO_GRAPH",
    "GradientStop",
    "GradientTape",
    "Loss",
    "check_checkpointing",
    "checkpointing",
    "frozen",
    "gradient_of",
    "half_scale",
    "refuse_inference_mode",
    "refuse_swapped_weights",
]
