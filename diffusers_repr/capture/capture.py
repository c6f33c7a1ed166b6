"""`capture`: hooks in a context manager, an early exit after the last layer, no trace left."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusers_repr.capture.names import check_layers
from diffusers_repr.capture.offload import is_offloaded, only_reader, send_back
from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.hooks import AfterHook, BeforeHook, Hooks
from diffusers_repr.hub.compiled import is_compiled_in_place

Where = Literal["output", "input", "residual"]
Transform = Callable[[Tensor, str], Any]


_OPEN = threading.local()  # `.tapes`: the capture blocks that this thread is in, outermost first


class _Stop(BaseException):  # see `denoiser.hooks`: no code between may catch it
    """All layers are read; unwinds the forward to the end of the block that `tape` belongs to."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape


class Tape:
    """What `capture` recorded.

    Attributes:
        layers: Layer paths, in the order asked for.
        features: Layer path -> tensor (or what `transform` made of it), of the last forward.
        calls: How often the model was called.
    """

    def __init__(self, layers: Sequence[str], stop_early: bool = True) -> None:
        self.layers = tuple(layers)
        self.stop_early = stop_early
        self.features: dict[str, Any] = {}
        self.calls = 0
        self._versions: list[tuple[str, Tensor, int]] = []
        self._model: nn.Module | None = None  # while its block is open
        self._offloaded = False  # whether that model's weights are; asked once a block
        self._undo: list[Callable[[], None]] = []  # of forwards that are left before their end

    def __getitem__(self, layer: str) -> Any:
        if layer not in self.features:
            near = difflib.get_close_matches(str(layer), self.layers, n=3, cutoff=0.4)
            raise KeyError(f"{layer!r} was not captured. Closest: {near or list(self.layers[:3])}.")
        return self.features[layer]

    @property
    def complete(self) -> bool:
        """Whether every layer has run in the last forward."""
        return len(self.features) == len(self.layers)

    def _begin(self) -> None:
        self.calls += 1
        self.features = {}
        self._versions = []

    def _record(self, path: str, value: Tensor, transform: Transform | None) -> None:
        if path in self.features:
            raise ValueError(
                f"Layer {path!r} ran twice in one forward; which call is meant is not clear. Read another."
            )
        kept = value if transform is None else transform(value, path)
        if torch.compiler.is_dynamo_compiling():  # neither versions nor an early exit are part of a graph
            self.features[path] = kept
            return
        if isinstance(kept, Tensor):
            if kept.is_inference():  # has no version counter: a later change in place would go unseen
                kept = kept.clone() if _shares_memory(kept, value) else kept
            else:
                # Private in torch: without it, a later change in place of what was read would go unseen.
                self._versions.append((path, kept, kept._version))
        self.features[path] = kept
        self._stop_if_complete()

    def _stop_if_complete(self) -> None:
        """Leave the innermost block, unless an open block still needs the forward."""
        tapes = _OPEN.tapes
        if all(tape.stop_early and tape.complete for tape in tapes):
            raise _Stop(tapes[-1])

    def _check(self) -> None:
        if not self.calls:
            raise ValueError(
                "Nothing was captured: the model was not called inside `with capture(...)` (call `model(...)`, not "
                "`model.forward(...)` nor a compiled or wrapped copy of it)."
            )
        missed = [path for path in self.layers if path not in self.features]
        if missed:
            ran = [path for path in self.layers if path in self.features]
            raise ValueError(
                f"Never called in the forward: {missed} (called: {ran or 'none'}). `list_layers(denoiser)` shows the "
                "layers that run."
            )
        versions, self._versions = self._versions, []
        for path, kept, version in versions:
            if kept._version != version:
                raise RuntimeError(
                    f"The model changed the tensor of {path!r} in place after it was read; pass "
                    "transform=lambda x, path: x.clone()."
                )


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
    Blocks may be nested: the forward goes on until all of them have their layers. Only what the thread calls that has
    opened the block is read; other threads may run the model, or read it, meanwhile.

    To compile, enter first, call `torch.compile` inside and use the compiled model there only: the hooks become part
    of its graph, which always runs to its end.

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
        ValueError: Unknown layers (with the closest names), layers that never ran or ran twice, a model not called.
        RuntimeError: A compiled model, on which hooks would not fire; a layer whose tensor was changed in place; a
            model with offloaded weights that another thread is reading.

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
    tape = Tape(list(modules), stop_early)

    def read(path: str, value: Tensor) -> None:
        tape._record(path, value, transform)

    with recording(tape, model) as hooks:
        for path, module in modules.items():
            if where == "input":
                hooks.before(module, _input_hook(path, read))
            else:
                hooks.after(module, _output_hook(path, read))
        yield tape


@contextmanager
def recording(tape: Tape, model: nn.Module) -> Iterator[Hooks]:
    """Keep a tape open: calls of `model` start it anew, its early exit ends the block, which checks it at its end.

    Only the calls of this thread count.

    Yields:
        What sets hooks until the end of the block.

    Raises:
        RuntimeError: For a network with offloaded weights that another thread is reading.
    """
    tapes = _OPEN.__dict__.setdefault("tapes", [])
    with ExitStack() as stack:
        tape._offloaded = is_offloaded(model)
        if tape._offloaded:
            stack.enter_context(only_reader(model))
        tapes.append(tape)
        tape._model = model
        stack.callback(_close, tape)
        try:
            with ExitStack() as inner:
                hooks = Hooks(inner)
                hooks.before(model, lambda module, args, kwargs: tape._begin(), prepend=True)
                if tape._offloaded:
                    hooks.after(model, _unfinished, always_call=True)
                yield hooks
        except _Stop as stop:
            for model_left in [other._model for other in tapes if other._offloaded]:
                if model_left is not None:
                    send_back(model_left)
            if stop.tape is not tape:
                raise
        tape._check()


def _close(tape: Tape) -> None:
    _OPEN.tapes.remove(tape)
    tape._model = None
    while tape._undo:
        tape._undo.pop()()


def after_breaking_off(undo: Callable[[], None]) -> None:
    """Call `undo` at the end of the innermost block: a forward that is broken off calls no hook that would."""
    _OPEN.tapes[-1]._undo.append(undo)


def _unfinished(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if output is None:  # left by an error
        send_back(module)


def _output_hook(path: str, read: Callable[[str, Tensor], None]) -> AfterHook:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read(path, block_output(module, output, path))

    return hook


def _input_hook(path: str, read: Callable[[str, Tensor], None]) -> BeforeHook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
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


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def is_breaking_off(model: nn.Module) -> bool:
    """Whether a forward of `model` made now is left by `capture` before its end, so that nobody gets its output."""
    tapes: list[Tape] = getattr(_OPEN, "tapes", [])
    own = [tape for tape in tapes if tape._model is not None and _share_modules(model, tape._model)]
    return bool(own) and all(tape.stop_early and (tape in own or tape.complete) for tape in tapes)


def _share_modules(one: nn.Module, other: nn.Module) -> bool:
    return any(part is one for part in other.modules()) or any(part is other for part in one.modules())


def refuse_compiled(
    model: nn.Module,
    remedy: str = "Enter `capture` first and compile inside it, or pass the plain module (`model._orig_mod`, or load "
    "it anew).",
    touched: Collection[str] | None = None,
) -> None:
    """Raise RuntimeError if the model or a part of it is compiled, scripted or exported: hooks would not fire.

    Args:
        model: The model.
        remedy: What to do about it.
        touched: Paths of the modules that get hooks: other compiled parts are then left alone. None: all.
    """
    for path, module in model.named_modules():
        inside = [where for where in touched or () if where == path or where.startswith(f"{path}.")]
        if touched is not None and path and not inside:
            continue
        # The marks that torch leaves are private and no function asks for all of them. Where one is renamed, hooks on
        # such a module are ignored in silence; tests compile, script and export to see it.
        compiled = (
            is_compiled_in_place(module)
            or type(module).__name__ in ("OptimizedModule", "InterpreterModule")
            or isinstance(module, torch.jit.ScriptModule)
            or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        )
        if compiled:
            on = f" on {inside[0]}" if inside and inside[0] != path else ""
            raise RuntimeError(
                f"{path or 'The model'} ({type(module).__name__}) is compiled; hooks set now{on} would be ignored. "
                f"{remedy}"
            )
