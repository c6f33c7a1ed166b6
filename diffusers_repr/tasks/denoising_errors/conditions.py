"""What the network is told of each prompt or class: encoded once, taken by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import merge_rows
from diffusers_repr.tasks.denoising_errors.memory import smaller_batch


class ConditionRows:
    """The conditions of prompts or classes, each of one row, in memory of the machine.

    Args:
        rows: Network inputs of each prompt, with one row.
        unbatched: Names without a batch dimension.
        device: Where the network takes them.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], unbatched: tuple[str, ...], device: torch.device) -> None:
        self.rows, self.unbatched, self.device = list(rows), unbatched, device
        shapes = [_shapes(row) for row in rows]
        kinds = {shape: at for at, shape in enumerate(dict.fromkeys(shapes))}
        self.kinds = torch.tensor([kinds[shape] for shape in shapes])
        self._merged: dict[int, tuple[dict[str, Any], dict[int, int]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def same_shapes(self, prompts: Tensor) -> list[Tensor]:
        """Places of prompts that can go through one forward: some text encoders give as many tokens as a text has."""
        kinds = self.kinds[prompts]
        return [(kinds == kind).nonzero()[:, 0] for kind in kinds.unique().tolist()]

    def take(self, prompts: Tensor) -> dict[str, Any]:
        """Network inputs for a batch, on the network's device.

        Args:
            prompts: `(B,)`, of one shape.
        """
        kind = int(self.kinds[prompts[0]])
        if kind not in self._merged:
            members = (self.kinds == kind).nonzero()[:, 0].tolist()
            parts = [self.rows[member] for member in members]
            self._merged[kind] = merge_rows(parts, self.unbatched), {one: at for at, one in enumerate(members)}
        merged, places = self._merged[kind]
        index = torch.tensor([places[one] for one in prompts.tolist()])
        return {name: self._rows(name, value, index, len(places)) for name, value in merged.items()}

    def _rows(self, name: str, value: Any, index: Tensor, count: int) -> Any:
        if isinstance(value, Mapping):
            return {key: self._rows(key, part, index, count) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        batched = name not in self.unbatched and value.ndim and value.shape[0] == count
        return (value[index] if batched else value).to(self.device)


def encode_conditions(
    denoiser: Denoiser,
    *,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    size: tuple[int, ...] | None = None,
    batch_size: int = 64,
) -> ConditionRows:
    """Encode prompts, or look classes up.

    Args:
        denoiser: The base.
        prompts: Of a text model.
        class_labels: Of a class-conditional one.
        size: Of the images, (H, W) in pixels.
        batch_size: Prompts encoded at a time; made smaller, with a warning, where memory does not suffice.
    """
    values = list(prompts if prompts is not None else class_labels or [])
    rows: list[dict[str, Any]] = []
    unbatched: tuple[str, ...] = denoiser.family.unbatched
    while len(rows) < len(values):
        part = values[len(rows) : len(rows) + batch_size]
        given: dict[str, Any] = {"prompt": part} if prompts is not None else {"class_labels": part}
        try:
            with torch.no_grad():
                found = _one_by_one(denoiser, given, len(part), size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            batch_size = smaller_batch(len(part), error, "prompts that are encoded together")
            continue
        rows += found
    return ConditionRows(rows, unbatched, denoiser.device)


def _one_by_one(
    denoiser: Denoiser, given: Mapping[str, Any], count: int, size: tuple[int, ...] | None
) -> list[dict[str, Any]]:
    """Each row for itself, on the CPU; texts of unequal lengths are encoded alone."""
    try:
        condition = denoiser.condition(**given, batch=count, size=size)
    except ValueError:
        if count == 1:
            raise
        return [
            row
            for at in range(count)
            for row in _one_by_one(denoiser, {k: v[at : at + 1] for k, v in given.items()}, 1, size)
        ]
    return [_to_cpu(condition.take([at])) for at in range(count)]


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _shapes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _shapes(part)) for name, part in sorted(value.items()))
    return tuple(value.shape) if isinstance(value, Tensor) else None


__all__ = ["ConditionRows", "encode_conditions"]
