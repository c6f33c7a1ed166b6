"""What guidances by heads on maps share: reading a head at a call, and the levels it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.gradient import GradientStop
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.hooks import AfterHook, Hooks
from diffusers_repr.guidance.base import Interval, Level
from diffusers_repr.heads import MapHead
from diffusers_repr.noise import NoiseSchedule


def check_head(method: str, head: Any, name: str = "head") -> None:
    """Raise TypeError unless `head` is a head on maps."""
    if not isinstance(head, MapHead):
        raise TypeError(
            f"{method} takes a head on maps as {name}, such as ReadoutHead.from_pretrained(...); got "
            f"{type(head).__name__}."
        )


def read_head(
    head: MapHead, features: Mapping[str, Tensor], call: NetworkCall, like: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Readout `(B, C, H, W)` of a call's features, computed on the head's device, then as `like` in device and dtype.

    Args:
        head: The head; told the training timestep of the call's level.
        features: Layer path -> map.
        call: The call.
        like: A tensor in float32 or wider.
        size: (H, W); that of the head's largest map if None.
    """
    module: Any = head
    device = next(module.parameters()).device
    maps = {path: features[path].to(device) for path in head.config["layers"]}
    return module(maps, float(call.level.timestep), size).to(like)


def seen_levels(schedule: NoiseSchedule, *heads: MapHead) -> Interval | None:
    """Noise levels that all heads were trained on; None for all that the process has.

    Raises:
        ValueError: If there are none.
    """
    first, last = schedule.timestep_range
    low = max(first, *(float(head.config["level_range"][0]) for head in heads))
    high = min(last, *(float(head.config["level_range"][1]) for head in heads))
    if low > high:
        ranges = [tuple(head.config["level_range"]) for head in heads]
        raise ValueError(
            f"No timestep of this model, {first:g} to {last:g}, is in the level_range of each head: {ranges}."
        )
    ends: tuple[Level, Level] = (low, high)
    return None if ends == (first, last) else ends


def features_of(model: nn.Module, layers: Sequence[str], forward: Callable[[], Any]) -> dict[str, Tensor]:
    """What layers return in a forward that is left after the last of them."""
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}

    def hook(path: str) -> AfterHook:
        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[path] = block_output(module, output, path)
            if len(found) == len(layers):
                raise GradientStop(path)

        return read

    with ExitStack() as stack:
        hooks = Hooks(stack)
        for path in layers:
            hooks.after(modules[path], hook(path))
        with suppress(GradientStop):
            forward()
    missed = [path for path in layers if path not in found]
    if missed:
        raise RuntimeError(f"Layers {missed} were not called in the forward; the head has nothing to read.")
    return found


__all__ = ["check_head", "features_of", "read_head", "seen_levels"]
