"""`capture`: hooks in a context manager, an early exit after the last layer, no trace left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser.streams import image_stream

Where = Literal["output", "input", "residual"]
Transform = Callable[[Tensor, str], Any]


class _Stop(Exception):
    """All layers are read; unwinds the forward."""


class Tape:
    """What `capture` recorded.

    Attributes:
        features: Layer path -> tensor (or what `transform` made of it), of the last forward.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.features: dict[str, Any] = {}
        self.calls = 0
        self._versions: list[tuple[str, Tensor, int]] = []

    def __getitem__(self, layer: str) -> Any:
        return self.features[layer]

    def _begin(self) -> None:
        self.calls += 1
        self.features = {}
        self._versions = []

    def _record(self, path: str, value: Tensor, transform: Transform | None) -> None:
        if path in self.features:
            raise ValueError(
                f"Layer {path!r} ran twice in one forward; which call is meant is not clear. Read another."
            )
        if transform is None:
            self.features[path] = value
            if not value.is_inference() and not torch.compiler.is_compiling():
                self._versions.append((path, value, value._version))
        else:
            self.features[path] = transform(value, path)

    def _check(self) -> None:
        if not self.calls:
            raise ValueError("Nothing was captured: the model was not called inside `with capture(...)`.")
        missed = [path for path in self.layers if path not in self.features]
        if missed:
            ran = [path for path in self.layers if path in self.features]
            raise ValueError(
                f"Never called in the forward: {missed} (called: {ran or 'none'}). `list_layers(denoiser)` shows the "
                "layers that run."
            )
        for path, value, version in self._versions:
            if value._version != version:
                raise RuntimeError(
                    f"The model changed the output of {path!r} in place after it was read; pass "
                    "transform=lambda x, path: x.clone()."
                )
        self._versions = []


@contextmanager
def capture(
    model: nn.Module,
    layers: str | Sequence[str],
    where: Where = "output",
    stop_early: bool = True,
    transform: Transform | None = None,
) -> Iterator[Tape]:
    """Keep what named layers return, take in, or add, while `model` runs inside the block.

    The features are bit-equal to those of a full forward; gradients, autocast and other hooks work as ever. With
    `stop_early` the forward stops after the last layer and leaves the `with` block: one model call, as its last line.

    Args:
        model: Any `nn.Module`; call it inside the block.
        layers: Exact full module paths (`match_layers` turns a pattern into paths).
        where: `output`; `input` (the first tensor a layer takes); `residual` (of a ResnetBlock2D, the output of its
            `conv2`, before the shortcut is added).
        stop_early: Stop the forward once every layer has run.
        transform: `(tensor, path) -> anything`, applied at once, e.g. to pool; only its result is kept.

    Yields:
        A `Tape`; read `tape.features` after the block.

    Raises:
        ValueError: Unknown layers (with the closest names), layers that never ran, or a model that was not called.
        RuntimeError: A compiled model, on which hooks would not fire.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with capture(net, ["1"]) as tape:
        ...     _ = net(torch.ones(1, 2))
        >>> tape.features["1"].shape
        torch.Size([1, 3])
    """
    refuse_compiled(model)
    if where not in ("output", "input", "residual"):
        raise ValueError(f"where={where!r}; expected 'output', 'input' or 'residual'.")
    modules = {
        path: _residual(path, m) if where == "residual" else m for path, m in check_layers(model, layers).items()
    }
    tape = Tape(list(modules))
    handles = [model.register_forward_pre_hook(lambda module, args: tape._begin(), prepend=True)]

    def read(path: str, value: Tensor) -> None:
        tape._record(path, value, transform)
        if stop_early and len(tape.features) == len(tape.layers):
            raise _Stop

    try:
        for path, module in modules.items():
            if where == "input":
                handles.append(module.register_forward_pre_hook(_input_hook(path, read), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_output_hook(path, read)))
        with suppress(_Stop):
            yield tape
        tape._check()
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(path: str, read: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        read(path, image_stream(module, output, path))

    return hook


def _input_hook(path: str, read: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Layer {path!r} ({type(module).__name__}) takes no tensor first; got {type(value).__name__}."
            )
        read(path, value)

    return hook


def _residual(path: str, module: nn.Module) -> nn.Module:
    conv = getattr(module, "conv2", None)
    if type(module).__name__ != "ResnetBlock2D" or conv is None:
        raise ValueError(
            f"where='residual' reads the branch of a ResnetBlock2D; {path!r} is a {type(module).__name__}. "
            "Take where='output', or layers such as 'up_blocks.1.resnets.0'."
        )
    return conv


def refuse_compiled(model: nn.Module) -> None:
    """Raise RuntimeError if the model or a part of it is compiled, scripted or exported: hooks would not fire."""
    for path, module in model.named_modules():
        compiled = (
            getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        )
        if compiled or isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "InterpreterModule":
            raise RuntimeError(
                f"{path or 'The model'} ({type(module).__name__}) is compiled; hooks set now would be ignored. Enter "
                "`capture` first and compile inside it (stop_early=False), or pass the plain module "
                "(`model._orig_mod`, or load it anew)."
            )
