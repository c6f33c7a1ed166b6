"""What guidances by heads on maps share: reading a head, the levels it has seen, settings in one form, means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.capture.gradient import GradientStop
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser.block_outputs import block_output
from diffusers_repr.denoiser.hooks import AfterHook, Hooks
from diffusers_repr.guidance.base import Interval
from diffusers_repr.heads import MapHead
from diffusers_repr.noise import LevelLike, NoiseSchedule


@dataclass(frozen=True, eq=False)
class Comparison:
    """What readouts of one kind of head are compared with, and how far they are from it; checked when made.

    Attributes:
        head: The head.
        published: Resize maps and take the range of the latents as the published code does.
    """

    head: MapHead
    published: bool = False
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def takes(cls) -> set[str]:
        """Names of the settings that only some kinds have."""
        return {field.name for field in fields(cls)} - {"head", "rescale", "published"}

    def loss(self, read: Tensor, reference: Tensor | None, x: Tensor) -> Tensor:
        """One number a sample, `(B,)`, from readouts `(B, C, H, W)` of x; `reference` is that of a reference."""
        raise NotImplementedError

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


# Heads


def require_map_head(method: str, head: Any, name: str = "head") -> None:
    """Raise TypeError unless `head` is a head on maps."""
    if not isinstance(head, MapHead):
        raise TypeError(
            f"{method} takes a head on maps as {name}, such as ReadoutHead.from_pretrained(...); got "
            f"{type(head).__name__}."
        )


def head_readout(
    head: MapHead,
    features: Mapping[str, Tensor],
    call: NetworkCall,
    like: Tensor,
    size: tuple[int, int] | None = None,
    *,
    published: bool = False,
) -> Tensor:
    """Readout `(B, C, H, W)` of a call's features, computed on the head's device, then as `like` in device and dtype.

    Args:
        head: The head; it gets the training timestep of the call's level.
        features: Layer path -> map.
        call: The call.
        like: A tensor in float32 or wider.
        size: (H, W); that of the head's largest map if None.
        published: Embed that timestep itself also where the head was trained on reversed ones, as the published code.
    """
    module: Any = head
    device = next(module.parameters()).device
    maps = {path: features[path].to(device) for path in head.config["layers"]}
    timestep = float(call.level.timestep)
    if published and head.config.get("reversed_time"):
        timestep = module.mirrored(timestep)
    return module(maps, timestep, size).to(like)


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
    ends: tuple[LevelLike, LevelLike] = (low, high)
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


# Settings


def as_tensor(name: str, value: Any) -> Tensor:
    """A setting as a floating tensor of finite numbers.

    Raises:
        TypeError: For what is no tensor or array.
        ValueError: For an empty one, and values that are not real or not finite.
    """
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array; got {type(value).__name__}.") from error
    if found.is_complex() or not found.numel():
        raise ValueError(f"{name} must hold real numbers; got {found.dtype} of shape {tuple(found.shape)}.")
    found = found.detach() if found.is_floating_point() else found.float()
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite.")
    return found


def as_mask(value: Any) -> Tensor:
    """As `(B, 1, H, W)`, in [0, 1] and not all 0."""
    found = as_tensor("mask", value)
    shape = tuple(found.shape)
    if found.ndim in (2, 3):
        found = found.reshape(-1, 1, *shape[-2:])
    if found.ndim != 4 or found.shape[1] != 1:
        raise ValueError(f"mask must be (H, W), (B, H, W) or (B, 1, H, W); got {shape}.")
    low, high = float(found.min()), float(found.max())
    if low < 0 or high > 1:
        raise ValueError(f"mask must lie in [0, 1]; got {low:g} to {high:g}.")
    if not bool(found.flatten(1).any(1).all()):
        raise ValueError("mask is 0 everywhere: nothing would be compared.")
    return found


def as_pixels(name: str, value: Any, shape: str) -> tuple[int, ...]:
    """Whole numbers from 0, as many as `shape` names."""
    items = tuple(value.tolist() if isinstance(value, Tensor) else value) if hasattr(value, "__iter__") else ()
    numbers = [v for v in items if isinstance(v, Integral) and not isinstance(v, bool)]
    if len(items) != len(shape.split(",")) or len(numbers) != len(items) or any(v < 0 for v in numbers):
        raise ValueError(f"{name} must be ({shape}) in whole pixels of the readout, from 0; got {value!r}.")
    return tuple(int(v) for v in numbers)


def check_row(row: Any) -> None:
    """Raise ValueError unless it is the number of a sample, or None."""
    if row is not None and (isinstance(row, bool) or not isinstance(row, Integral) or row < 0):
        raise ValueError(f"reference_row must be the number of a sample, from 0; got {row!r}.")


# Maps


def without_row(loss: Tensor, row: int) -> Tensor:
    """Losses `(B,)` without that of a sample which is not guided itself.

    Raises:
        ValueError: If there is no such sample, or no other one.
    """
    if len(loss) < 2 or row >= len(loss):
        raise ValueError(
            f"reference_row={row} of a batch of {len(loss)}: the batch must hold the reference and at least one "
            "sample to guide."
        )
    # zero, exactly: what rounding leaves would be a whole sign step
    return loss * (torch.arange(len(loss), device=loss.device) != row)


def at_readout(name: str, value: Tensor, read: Tensor, *, nearest: bool = False) -> Tensor:
    """A map that is one for all samples or one each, and of about their shape, at the size of their readouts."""
    if len(value) not in (1, len(read)):
        raise ValueError(f"{name} has {len(value)} rows for {len(read)} samples; give one for all, or one each.")
    (height, width), (own, across) = value.shape[-2:], read.shape[-2:]
    if not 0.8 <= height * across / (width * own) <= 1.25:  # beyond what rounding to whole cells does
        raise ValueError(
            f"{name} is {height} x {width} (H x W), the readout of these samples {own} x {across}: it would be "
            "squeezed. Crop or pad it to their shape, or sample images of its shape (height=, width=)."
        )
    return resize_target(value.to(read), (own, across), nearest=nearest)


def resize_target(target: Tensor, size: tuple[int, int], *, nearest: bool = False) -> Tensor:
    """A map `(B, C, H, W)` at another size: averaged over areas where it shrinks, bilinear where it grows.

    With `nearest` by the nearest value in both cases.
    """
    height, width = target.shape[-2:]
    if (height, width) == tuple(size):
        return target
    if nearest:
        return functional.interpolate(target, size, mode="nearest")
    shrinks = height >= size[0] and width >= size[1]
    return functional.interpolate(target, size, mode="area" if shrinks else "bilinear")


def span(x: Tensor, *, whole: bool = False) -> Tensor:
    """Largest minus smallest value of each sample, or of the `whole` batch, `(B,)`, without gradient."""
    flat = x.detach().flatten(1)
    high, low = flat.amax(1), flat.amin(1)
    return (high.amax() - low.amin()).expand(len(x)) if whole else high - low


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of each sample, `(B,)`, of values `(B, 1, H, W)`; `weights` `(B or 1, 1, H, W)` or None."""
    if weights is None:
        return values.mean((1, 2, 3))
    weights = weights.to(values.dtype).expand_as(values)
    return (weights * values).sum((1, 2, 3)) / weights.sum((1, 2, 3))
