"""What a forward computes before a certain point, kept by parts of the network and taken over by another forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.batching import map_rows
from diffusers_repr.capture.caches import cache_kinds
from diffusers_repr.capture.capture import capture
from diffusers_repr.capture.forwards import replace_forward
from diffusers_repr.capture.offload import is_offloaded
from diffusers_repr.denoiser.hooks import AfterHook, BeforeHook, Hooks
from diffusers_repr.hub.compiled import is_compiled_in_place, plain_module

Run = Callable[[], Any]


def units_around(model: nn.Module, inside: Sequence[str], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest parts of a network that hold none of the modules `inside`, which are parts themselves."""
    for name, child in model.named_children():
        place = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) or any(one.startswith(f"{place}.") for one in inside):
            yield from units_around(child, inside, place)
        else:
            yield place, child


def first_reader(model: nn.Module, name: str, run: Run) -> str | None:
    """The innermost module that takes an input of the network first; None if none does.

    None too where no part may be left out: in networks that are compiled, offloaded, or keep activations.

    Args:
        model: The network.
        name: Of a keyword input of its forward.
        run: Calls the network.

    Example:
        >>> import torch
        >>> net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(1, 2)
        >>> first_reader(net, "input", lambda: net(input=x))
        '0'
    """
    compiled = any(is_compiled_in_place(module) or plain_module(module) is not module for module in model.modules())
    if compiled or is_offloaded(model) or cache_kinds(model):
        return None
    taken: list[Any] = []
    found: list[str] = []

    def note(path: str) -> BeforeHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not path:
                taken.append(kwargs[name])
            elif any(part is taken[-1] for part in (*args, *kwargs.values())):
                found.append(path)

        return hook

    with ExitStack() as stack:
        hooks = Hooks(stack)
        for path, module in model.named_modules():
            hooks.before(module, note(path))
        run()
    return next((path for path in found if not any(other.startswith(f"{path}.") for other in found)), None)


class Prefix:
    """Outputs of parts of a network, of the calls of one forward.

    Args:
        units: Path -> part.

    Attributes:
        outputs: Path -> what the part returned, call by call.
    """

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self.units = units
        self.outputs: dict[str, list[Any]] = {}
        self._versions: list[tuple[str, Tensor, int]] = []
        self._open = True

    def record(self, hooks: Hooks, until: Sequence[nn.Module] = ()) -> None:
        """Keep what the parts return, up to the output of the first of these modules."""

        def keep(path: str) -> AfterHook:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if self._open:
                    self.outputs.setdefault(path, []).append(output)
                    self._versions += [(path, one, one._version) for one in _tensors(output) if not one.is_inference()]

            return hook

        def close(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._open = False

        for path, module in self.units.items():
            hooks.after(module, keep(path))
        for module in until:
            hooks.after(module, close)

    @property
    def changed(self) -> list[str]:
        """Paths of parts whose output was changed in place after it was kept."""
        return sorted({path for path, value, version in self._versions if value._version != version})

    def renew(self) -> None:
        """What was changed in place so far belongs to the forward itself."""
        self._versions = [(path, value, value._version) for path, value, _ in self._versions]

    def replay(self, stack: ExitStack, change: Callable[[Any], Any] = lambda output: output) -> None:
        """Until the stack is closed the parts return what was kept, once a call that was, instead of running."""
        for path, outputs in self.outputs.items():
            stack.callback(replace_forward(self.units[path], _giving(outputs, change)))


class SharedPrefix:
    """Runs what comes before a module on the distinct rows of a batch only.

    Args:
        model: The network.
        until: Path of the first module for which rows with equal inputs differ.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x, index = torch.randn(2, 2), torch.tensor([0, 0, 1])
        >>> with SharedPrefix(net, "2").shared(lambda: net(x), 2, index):
        ...     y = net(x[index])
        >>> torch.allclose(y, net(x[index]))
        True
    """

    def __init__(self, model: nn.Module, until: str) -> None:
        self.model, self.until = model, until
        self._units = dict(units_around(model, [until]))
        del self._units[until]

    @contextmanager
    def shared(self, run: Run, rows: int, index: Tensor) -> Iterator[None]:
        """Inside, a call of the network takes over what `run` computes before the module, row `index[i]` for row i.

        Where the network changes in place what it computed, nothing can be taken over, and nothing is.

        Args:
            run: Calls the network with the distinct rows; it is left where the module stands.
            rows: How many these are.
            index: `(B,)`, on the network's device; of each row of the call inside, the distinct one it is.
        """
        prefix = Prefix(self._units)
        with capture(self.model, [self.until], where="input"), ExitStack() as stack:
            prefix.record(Hooks(stack))
            run()
        with ExitStack() as stack:
            if not prefix.changed:
                prefix.replay(stack, lambda output: map_rows(output, rows, lambda value: value[index]))
            yield


def _giving(outputs: Sequence[Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    left = list(outputs)

    def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return change(left.pop(0)) if left else forward(*args, **kwargs)  # it may run again, past the point

    return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


__all__ = ["Prefix", "SharedPrefix", "first_reader", "units_around"]
