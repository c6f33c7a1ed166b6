"""Conditions made by the pipeline's own code: its call runs to the first denoiser call, whose arguments are kept."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.hub.compiled import plain_module, pop_compiled_call, put_compiled_call


@dataclass(frozen=True)
class Condition:
    """Keyword inputs of the network besides the noisy input and the timestep.

    Attributes:
        inputs: Name -> tensor with `rows` rows, nested dict of such, or anything else (passed as it is).
        rows: Distinct rows held.
        index: Row of each sample, `(B,)`; equal prompts share a row.
        unbatched: Names without a batch dimension.
        null: The null condition (negative prompt or null class), where one was asked for.
    """

    inputs: Mapping[str, Any]
    rows: int
    index: Tensor
    unbatched: tuple[str, ...] = ()
    null: Condition | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, samples: Sequence[int] | Tensor) -> dict[str, Any]:
        """Network inputs for the samples at these positions, in this order."""
        rows = self.index[torch.as_tensor(samples, dtype=torch.long)]
        return {name: self._rows(name, value, rows) for name, value in self.inputs.items()}

    def kwargs(self) -> dict[str, Any]:
        """Network inputs for all samples."""
        return self.take(torch.arange(len(self)))

    def _rows(self, name: str, value: Any, rows: Tensor) -> Any:
        if isinstance(value, Mapping):
            return {k: self._rows(k, v, rows) for k, v in value.items()}
        if isinstance(value, Tensor) and name not in self.unbatched and value.ndim and value.shape[0] == self.rows:
            return value.index_select(0, rows.to(value.device))
        return value


# For tokenizers, which threads must not share, and the global random state.
_ONE_AT_A_TIME = threading.RLock()


class _FirstCall(BaseException):  # nothing on its way is to catch it, nor torch to tell hooks of it
    """Carries the arguments of the first denoiser call out of a pipeline."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("first denoiser call")
        self.arguments = (args, kwargs)


def first_call(pipe: Any, model: nn.Module, call: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Run `pipe(**call)` up to its first call of `model`; return that call's keyword inputs and its number of rows.

    The input itself, whose rows are counted, and the timestep are left out. The pipeline, its scheduler, its modules'
    training flags and the global random state stay as they were.

    Raises:
        ValueError: For an argument that the pipeline's call does not take.
        RuntimeError: If the pipeline returned without calling the model.
    """
    accepted = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    unknown = [name for name in call if name not in accepted]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}. It takes: {', '.join(accepted)}.")
    defaults = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator("cpu").manual_seed(0),
    }
    arguments = {**{k: v for k, v in defaults.items() if k in accepted}, **call}
    # The call writes attributes on the pipeline and steps into its scheduler and guiders: all are copies here.
    shadow = copy.copy(pipe)
    for name in ("scheduler", "guider", "ocr_guider"):
        if name in pipe.__dict__:
            shadow.__dict__[name] = copy.deepcopy(pipe.__dict__[name])
    # Of the copy alone; the public `set_progress_bar_config` writes the same private attribute.
    shadow.__dict__["_progress_bar_config"] = {"disable": True}
    try:
        with _ONE_AT_A_TIME, _untouched(pipe), _stopped_at(model), torch.no_grad():
            shadow(**arguments)
    except _FirstCall as made:
        return _named_inputs(model, *made.arguments)
    raise RuntimeError(f"{type(pipe).__name__} returned without calling its {type(model).__name__}.")


@contextmanager
def _stopped_at(model: nn.Module) -> Iterator[None]:
    """Raise `_FirstCall` where `model` is called, before any other hook of it runs."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(args, kwargs)

    # A module compiled in place ignores new hooks; without its compiled call torch takes the plain one.
    compiled = pop_compiled_call(model)
    try:
        with ExitStack() as stack:
            Hooks(stack).before(model, stop, prepend=True)
            yield
    finally:
        put_compiled_call(model, compiled)


@contextmanager
def _untouched(pipe: Any) -> Iterator[None]:
    """Eval mode, the random state and the tokenizers' settings as they were before, after the block."""
    components = list(pipe.components.values())
    # Some pipelines set the padding side of their tokenizer.
    sides = [(item, item.padding_side) for item in components if isinstance(getattr(item, "padding_side", None), str)]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            eval_mode(*(item for item in components if isinstance(item, nn.Module))),
        ):
            yield
    finally:
        for tokenizer, side in sides:
            tokenizer.padding_side = side


def _named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    names = forward_names(model)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rows = len(given[names[0]])  # a tensor, or a list of images of unequal sizes
    for name in (names[0], "timestep", "return_dict"):
        given.pop(name, None)
    return given, rows


def forward_names(model: nn.Module) -> list[str]:
    """Names of what a network's forward takes, the noisy input first."""
    return list(inspect.signature(type(plain_module(model)).forward).parameters)[1:]


# Module -> the blocks of `eval_mode` that it is in, oldest first, each with the mode to come back to.
_MODES: dict[nn.Module, list[_Mode]] = {}
_MODES_LOCK = threading.Lock()


@dataclass(eq=False)
class _Mode:
    training: bool


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own mode comes back after, its children's too.

    Where blocks of several threads overlap, it comes back with the last of them.
    """
    children = list(dict.fromkeys(child for module in modules for child in module.modules()))
    with _MODES_LOCK:
        kept = [_Mode(child.training) for child in children]
        for child, mode in zip(children, kept, strict=True):
            _MODES.setdefault(child, []).append(mode)
        for module in modules:
            module.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for child, mode in zip(children, kept, strict=True):
                _leave(child, mode)


def _leave(child: nn.Module, mode: _Mode) -> None:
    """The mode comes back; where a block entered later is still open, it is that block's to bring back."""
    blocks = _MODES[child]
    at = blocks.index(mode)
    if at == len(blocks) - 1:
        child.training = mode.training
    else:
        blocks[at + 1].training = mode.training
    del blocks[at]
    if not blocks:
        del _MODES[child]


def merge_rows(parts: Sequence[Mapping[str, Any]], unbatched: tuple[str, ...]) -> dict[str, Any]:
    """Stack the inputs of one-row conditions into one condition of `len(parts)` rows."""
    first = parts[0]
    merged: dict[str, Any] = {}
    for name, value in first.items():
        if isinstance(value, Mapping):
            merged[name] = merge_rows([part[name] for part in parts], unbatched)
        elif isinstance(value, Tensor) and name not in unbatched and value.ndim and value.shape[0] == 1:
            shapes = {tuple(part[name].shape) for part in parts}
            if len(shapes) > 1:
                raise ValueError(f"Prompts give {name!r} of unequal shapes {sorted(shapes)}; pass them one at a time.")
            merged[name] = torch.cat([part[name] for part in parts])
        else:
            merged[name] = value
    return merged
