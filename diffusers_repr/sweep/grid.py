"""The grid of a sweep: layers of a model, in execution order, at noise levels; and how much of it fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_repr.capture import check_layers
from diffusers_repr.denoiser import Denoiser, Layer, list_layers
from diffusers_repr.noise import LevelLike, NoiseLevel


@dataclass(frozen=True)
class SweepGrid:
    """Layers by noise levels of one model.

    Attributes:
        denoiser: The model.
        layers: Path -> layer, in execution order.
        levels: Resolved.
    """

    denoiser: Denoiser
    layers: Mapping[str, Layer]
    levels: tuple[NoiseLevel, ...]

    @property
    def device(self) -> torch.device:
        """Where measures keep sums and compute: the model's device if it knows float64."""
        where = self.denoiser.device
        return where if where.type in ("cpu", "cuda") else torch.device("cpu")

    def part(self, layers: Sequence[str], levels: Sequence[int]) -> SweepGrid:
        """The grid of some layers and of the levels with these indices."""
        table = {path: layer for path, layer in self.layers.items() if path in layers}
        return SweepGrid(self.denoiser, table, tuple(self.levels[at] for at in levels))

    def level_of(self, timestep: float) -> int:
        """Index of the level with this timestep."""
        return next(at for at, level in enumerate(self.levels) if float(level.timestep) == timestep)

    def places(self) -> list[tuple[int, dict[str, Any]]]:
        """Of every cell, level by level: the index of its level, and the fields of a `Cell` that tell where it is."""
        return [
            (
                at,
                {
                    "layer": path,
                    "order": order,
                    "timestep": plain_timestep(level),
                    "nsr": float(level.nsr),
                    "flops_share": layer.flops_share,
                },
            )
            for at, level in enumerate(self.levels)
            for order, (path, layer) in enumerate(self.layers.items())
        ]


def plain_timestep(level: NoiseLevel) -> int | float:
    """The timestep as a whole number where it is one."""
    value = float(level.timestep)
    return int(value) if value.is_integer() else value


def resolve_levels(denoiser: Denoiser, timesteps: Sequence[LevelLike]) -> list[NoiseLevel]:
    """The levels that were asked for, each once, in their order.

    Raises:
        TypeError: If it is no list.
        ValueError: If it is empty, or a level is given twice or does not suit the model.
    """
    if isinstance(timesteps, (int, float, str, NoiseLevel)) or not isinstance(timesteps, Sequence):
        raise TypeError(f"timesteps must be a list of levels, e.g. [10, 50, 100]; got {timesteps!r}.")
    if not timesteps:
        raise ValueError("No timesteps: the list is empty.")
    levels = [denoiser.level(t) for t in timesteps]
    values = [float(level.timestep) for level in levels]
    for at, timestep in enumerate(values):
        if timestep in values[:at]:
            raise ValueError(f"Timestep {timestep:g} is given twice.")
    return levels


def resolve_layers(
    denoiser: Denoiser, layers: Sequence[str] | str | None, image_size: tuple[int, int]
) -> dict[str, Layer]:
    """Path -> layer, in execution order; those of `list_layers` if None.

    Args:
        denoiser: The model.
        layers: Full module paths.
        image_size: (H, W) of the images.

    Raises:
        ValueError: For an unknown layer, or one that gives no image.
    """
    if layers is not None:
        layers = list(check_layers(denoiser.model, layers))
    table = {layer.path: layer for layer in list_layers(denoiser, image_size, "blocks")}
    if layers is None:
        return table
    if not all(path in table for path in layers):
        table = {layer.path: layer for layer in list_layers(denoiser, image_size, "all")}
    for path in layers:
        if path not in table:
            raise ValueError(
                f"Layer {path!r} returns no image, or runs more than once a forward; `list_layers(denoiser)` shows "
                "what can be chosen."
            )
    return {path: layer for path, layer in table.items() if path in layers}


@dataclass(frozen=True)
class Pass:
    """A part of the grid that is measured while the images stream by once.

    Attributes:
        layers: Paths.
        levels: Indices into the grid's levels.
    """

    layers: tuple[str, ...]
    levels: tuple[int, ...]


def plan_passes(
    layers: Mapping[str, Layer], levels: int, bytes_of: Callable[[Layer], int], memory: float
) -> list[Pass]:
    """As few passes over the images as the memory allows.

    A pass takes whole levels while they fit; where not even one level fits, its layers are parted, and the network
    runs once more for each part.

    Args:
        layers: Path -> layer.
        levels: Number of levels.
        bytes_of: What the measures keep of a layer at one level.
        memory: Bytes that may be kept.

    Raises:
        ValueError: If one layer at one level does not fit.

    Example:
        >>> table = {name: Layer(name, "map", 4, (1, 1), 1.0, 1.0, 0, "Conv2d") for name in ("a", "b")}
        >>> [(p.layers, p.levels) for p in plan_passes(table, 3, lambda layer: 40 * layer.channels, memory=640)]
        [(('a', 'b'), (0, 1)), (('a', 'b'), (2,))]
    """
    sizes = {path: bytes_of(layer) for path, layer in layers.items()}
    together = int(memory // sum(sizes.values()))
    if together:
        every = tuple(layers)
        return [Pass(every, tuple(range(at, min(at + together, levels)))) for at in range(0, levels, together)]
    parts: list[list[str]] = [[]]
    for path, size in sizes.items():
        if size > memory:
            raise ValueError(
                f"What is kept of layer {path!r} ({layers[path].channels} channels) at one level takes "
                f"{size / 2**30:.3g} GiB, more than memory_gib={memory / 2**30:.3g}; raise memory_gib, leave the "
                "layer out, or take a smaller pooling or fewer images."
            )
        if sum(sizes[p] for p in parts[-1]) + size > memory:
            parts.append([])
        parts[-1].append(path)
    return [Pass(tuple(part), (level,)) for level in range(levels) for part in parts]
