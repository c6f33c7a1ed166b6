"""`SeveralConditioner`: more than one condition, dropped together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.inputs import Conditioned

DROP_MASK = "drop_mask"


class SeveralConditioner(Conditioner):
    """Conditions side by side, such as a cluster's vector and a map; a sample loses all of them by one draw.

    Values are a tuple, one entry a part.

    Args:
        *parts: Conditioners of different inputs of the network; two or more.
    """

    kind = "several conditions"

    def __init__(self, *parts: Conditioner) -> None:
        if len(parts) < 2:
            raise ValueError(f"Several conditioners are two or more; got {len(parts)}.")
        self.parts = parts

    def bound_to(self, denoiser: Conditioned) -> Self:
        """See `Conditioner`."""
        bound = super().bound_to(denoiser)
        bound.parts = tuple(part.bound_to(denoiser) for part in self.parts)
        return bound

    @property
    def has_null(self) -> bool:
        """Whether all have one."""
        return all(part.has_null for part in self.parts)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(column for part in self.parts for column in part.columns)

    @property
    def map_channels(self) -> int:
        """See `Conditioner`."""
        return sum(part.map_channels for part in self.parts)

    def trained_parts(self) -> dict[str, nn.Module]:
        """Those of all parts."""
        return {name: module for part in self.parts for name, module in part.trained_parts().items()}

    def from_batch(self, batch: Mapping[str, Any], count: int) -> tuple[Any, ...]:
        """See `Conditioner`."""
        return tuple(part.from_batch(batch, count) for part in self.parts)

    def draw_dropped(self, values: Any, chance: float, generator: torch.Generator | None = None) -> Tensor | None:
        """As the first part draws."""
        return self.parts[0].draw_dropped(values[0], chance, generator)

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """Those of all parts."""
        return _merged([part.inputs(value, dropped) for part, value in zip(self.parts, values, strict=True)])

    def null(self, count: int = 1) -> dict[str, Any]:
        """Those of all parts."""
        return _merged([part.null(count) for part in self.parts])

    def check(self, values: Any) -> None:
        """See `Conditioner`."""
        if not isinstance(values, (tuple, list)) or len(values) != len(self.parts):
            raise ValueError(
                f"values are a tuple of {len(self.parts)}: {', '.join(part.kind for part in self.parts)}."
            )
        for part, value in zip(self.parts, values, strict=True):
            part.check(value)

    def check_batch(self, batch: Mapping[str, Any], chance: float) -> None:
        """See `Conditioner`."""
        for part in self.parts:
            part.check_batch(batch, chance)

    def check_data(self, data: Any) -> None:
        """See `Conditioner`."""
        for part in self.parts:
            part.check_data(data)

    def describe(self) -> dict[str, Any]:
        """See `Conditioner`."""
        return {"kind": self.kind, "parts": [part.describe() for part in self.parts]}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict of all inputs; of masks of what the network is to drop itself the union.

    Raises:
        ValueError: If two conditions enter by one input.
    """
    merged: dict[str, Any] = {}
    for inputs in parts:
        for name, value in inputs.items():
            if name in merged and name != DROP_MASK:
                raise ValueError(f"Two conditions enter the network by {name!r}.")
            merged[name] = merged[name] | value if name in merged else value
    return merged


__all__ = ["SeveralConditioner"]
