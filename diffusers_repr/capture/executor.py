"""`Executor`: runs the lanes of a network call in as few passes and as little work as exactness allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, map_rows, without_rows
from diffusers_repr.capture.caches import replace_beneath_cache
from diffusers_repr.capture.lanes import Lane, LaneFunction, NetworkCall, Observer
from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.hooks import Hooks, Turn
from diffusers_repr.hub.compiled import is_compiled_in_place, plain_module, wrap_compiled_call

Hook = Callable[..., Any]


class Executor:
    """Lanes that share a pass of a network, by hooks on its modules.

    Rows of the pass: those of the call that are run, then `samples` rows for each lane. Up to the first top-level
    module that holds a changed module the lanes are one with the conditional rows; there they join the batch. A
    changed module runs its own forward for the other rows only.

    Args:
        model: The network.
        family: Its adapter.
        lanes: All lanes that calls may ask for.
        observers: Key -> (path, function): what to keep of the arguments of a module, of the rows of the call.

    Attributes:
        hooked: Paths of the modules that have hooks of their own; top-level modules that are compiled have none.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        lanes: Sequence[Lane] = (),
        observers: Mapping[str, tuple[str, Observer]] | None = None,
    ) -> None:
        self.model, self.family = model, family
        self.lanes, self.observers = tuple(lanes), dict(observers or {})
        self.hooked = frozenset[str]()
        self.unbatched = without_rows(family)
        self._active: tuple[Lane, ...] = ()
        self._observed: frozenset[str] = frozenset()
        self._call: NetworkCall | None = None
        self._rows = 0  # of the pass, before lanes join
        self._source = slice(0)  # the conditional rows among them
        self._stash: dict[str, list[Any]] = {}
        self._turn = Turn()  # the thread of the pass

    # Installing

    def install(self, stack: ExitStack) -> None:
        """Set the hooks; they do nothing but during a pass, in its thread. The stack removes them."""
        modules, hooks = dict(self.model.named_modules()), Hooks(stack, self._turn)
        self.hooked = self.touched
        if self.lanes:
            for path, unit in top_level(self.model):
                early = self._early_hook(path) if path in self.family.early_rows else None
                if is_compiled_in_place(unit):
                    stack.callback(wrap_compiled_call(unit, self._around(unit, self._unit_hook(path), early)))
                    continue
                if plain_module(unit) is unit:  # not on the wrapper of `torch.compile(block)`, where they act
                    self.hooked |= {path}
                hooks.before(unit, self._unit_hook(path))
                if early is not None:
                    hooks.after(unit, early)
        changed = {path for lane in self.lanes for path in lane.modules}
        for path in sorted(self.touched):
            hooks.before(modules[path], self._enter_hook(path))
            if path in changed:
                hooks.after(modules[path], self._leave_hook(path))

    @property
    def touched(self) -> frozenset[str]:
        """Paths of the modules that lanes change or observers read."""
        changed = {path for lane in self.lanes for path in lane.modules}
        return frozenset(changed | {path for path, _ in self.observers.values()})

    def _around(self, unit: nn.Module, before: Hook, after: Hook | None) -> Callable[..., Any]:
        """Hooks of a unit that is compiled as a whole: around its compiled call, in which they would be ignored."""

        def run(compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._turn():
                return compiled(*args, **kwargs)
            args, kwargs = before(unit, args, kwargs) or (args, kwargs)
            output = compiled(*args, **kwargs)
            changed = None if after is None else after(unit, args, kwargs, output)
            return output if changed is None else changed

        return run

    # One pass

    def begin(
        self, call: NetworkCall, which: slice, lanes: Sequence[Lane] = (), observers: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Start the pass that runs the rows `which` of a call together with lanes.

        Args:
            call: The call.
            which: Contiguous rows that are run; they include the conditional ones if there are lanes.
            lanes: The lanes of this pass.
            observers: Keys of the observers of this pass.

        Returns:
            Keyword inputs to run the network with.
        """
        self._turn.take()
        self._call, self._active, self._observed = call, tuple(lanes), frozenset(observers)
        start, stop, _ = which.indices(call.rows)
        self._rows = stop - start
        self._source = slice(call.batch.cond.start - start, call.batch.cond.stop - start)
        self._stash = {}
        inputs = index_batch(call.inputs, call.rows, which, self.unbatched)
        call.joined = None
        if not lanes:
            return inputs
        units = {self._unit_of(path) for lane in lanes for path in lane.modules}
        if not self.family.joins_at(inputs, units):
            call.joined = ""
            return self._join(inputs)
        for name in self.family.late_inputs(units):
            if inputs.get(name) is not None:
                inputs[name] = self._join(inputs[name])
        return inputs

    @contextmanager
    def alone(self, lane: Lane, call: NetworkCall) -> Iterator[set[str]]:
        """Inside, the network runs one lane: its modules compute what it says, all rows being its own.

        For networks that cache activations between calls: a cache on one of its modules caches what the lane computes
        there. It is not for networks that other threads call meanwhile.

        Args:
            lane: The lane.
            call: Whose conditional rows are run.

        Yields:
            Paths of the modules that were changed so far.
        """
        ran: set[str] = set()

        def replace(path: str, function: LaneFunction) -> Callable[[], None]:
            module = self.model.get_submodule(path)

            def run(*args: Any, **kwargs: Any) -> Any:
                ran.add(path)
                return function(module, args, kwargs, call)

            return replace_beneath_cache(module, run)

        with ExitStack() as stack:
            for path, function in lane.modules.items():
                stack.callback(replace(path, function))
            yield ran

    def end(self) -> None:
        """Close the pass, finished or not."""
        self._turn.end()
        self._call, self._active, self._observed, self._stash = None, (), frozenset(), {}

    def split(self, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows of the call, and the rows of each lane, in what the network returned for the pass.

        Raises:
            RuntimeError: If the lanes never joined: none of their modules ran.
        """
        if not self._active:
            return output, {}
        assert self._call is not None
        if output.shape[0] == self._rows:
            raise RuntimeError(not_called(self._active))
        samples = self._call.samples
        parts = output[self._rows :].split(samples)
        return output[: self._rows], {lane.name: part for lane, part in zip(self._active, parts, strict=True)}

    # Hooks

    def _unit_of(self, path: str) -> str:
        return next(name for name, _ in top_level(self.model) if path == name or path.startswith(name + "."))

    def _join(self, value: Any) -> Any:
        def repeat(t: Tensor) -> Tensor:
            return torch.cat([t, *[t[self._source]] * len(self._active)])

        return map_rows(value, self._rows, repeat, self.unbatched)

    def _unit_hook(self, path: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None or not self._active or call.joined == "":
                return None
            if call.joined is None:
                if not any(p == path or p.startswith(path + ".") for lane in self._active for p in lane.modules):
                    return None
                call.joined = path
            return self._join(args), self._join(kwargs)

        return hook

    def _early_hook(self, path: str) -> Hook:
        index = self.family.early_rows[path]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._call is None or not self._active or self._call.joined is not None:
                return None
            return tuple(self._join(item) if at == index else item for at, item in enumerate(output))

        return hook

    def _enter_hook(self, path: str) -> Hook:
        """Keep what an observer asks for; take the rows of the lanes that change this module out of its arguments."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return None
            total = self._rows + len(self._active) * call.samples * (call.joined is not None)
            for key, (where, function) in self.observers.items():
                if where == path and key in self._observed:
                    own = slice(0, self._rows)
                    own_args, own_kwargs = (index_batch(part, total, own, self.unbatched) for part in (args, kwargs))
                    call.observers[key] = function(module, own_args, own_kwargs, call)
            changes = [(lane, rows) for lane, rows in self._lane_rows() if path in lane.modules]
            if not changes:
                return None
            made = []
            for lane, rows in changes:
                own_args, own_kwargs = (index_batch(part, total, rows, self.unbatched) for part in (args, kwargs))
                made.append((rows, lane.modules[path], own_args, own_kwargs))
            self._stash[path] = made
            kept = self._kept(path, total)
            return tuple(
                map_rows(part, total, lambda t: torch.cat([t[rows] for rows in kept]), self.unbatched)
                for part in (args, kwargs)
            )

        return hook

    def _leave_hook(self, path: str) -> Hook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call, made = self._call, self._stash.pop(path, None)
            if call is None or made is None:
                return None
            total = self._rows + len(self._active) * call.samples
            parts: list[tuple[slice, Any]] = [(rows, run(module, a, k, call)) for rows, run, a, k in made]
            start = 0
            for rows in self._kept(path, total):
                length = rows.stop - rows.start
                parts.append((rows, index_batch(output, _rows_of(output), slice(start, start + length))))
                start += length
            return _concatenate([value for _, value in sorted(parts, key=lambda part: part[0].start)])

        return hook

    def _lane_rows(self) -> Iterator[tuple[Lane, slice]]:
        assert self._call is not None
        for at, lane in enumerate(self._active):
            start = self._rows + at * self._call.samples
            yield lane, slice(start, start + self._call.samples)

    def _kept(self, path: str, total: int) -> list[slice]:
        """Row ranges for which the module at `path` runs as ever."""
        others = [rows for lane, rows in self._lane_rows() if path not in lane.modules]
        return [slice(0, self._rows), *others]


def not_called(lanes: Sequence[Lane]) -> str:
    """Message for lanes that changed nothing."""
    paths = [path for lane in lanes for path in lane.modules]
    return f"None of {paths} was called in the forward; nothing would be changed."


def top_level(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The network's children, lists of modules by their elements: what its own forward calls."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            found += [(f"{name}.{at}", element) for at, element in enumerate(child)]
        else:
            found.append((name, child))
    return found


def _rows_of(output: Any) -> int:
    while not isinstance(output, Tensor):
        output = output[0]
    return output.shape[0]


def _concatenate(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if first is None:
        return None
    return type(first)(_concatenate(items) for items in zip(*values, strict=True))


__all__ = ["Executor", "LaneFunction", "not_called", "top_level"]
