"""Scales of classifier-free guidance: drawn for each image, and as many in one batch as it has images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.synthesis.draws import uniform_of


@dataclass(frozen=True)
class GuidanceSampler:
    """A scale for each image, uniform between two (MA-ZSC, arXiv 2302.03298: 1 to 5).

    Attributes:
        low: 1 is no guidance.
        high: As `low` where all images have the same.
        seed: Of the draws.

    Raises:
        ValueError: For scales below 1, which classifier-free guidance turns off, and a range upside down.

    Example:
        >>> 1 <= GuidanceSampler(1, 5)("a", 3) < 5
        True
    """

    low: float = 1.0
    high: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"Scales lie from 1 up, the lower first; got {self.low} to {self.high}.")

    def __call__(self, *what: str | int) -> float:
        """The scale of an image that is named by its source or class and its variant, to four digits."""
        return round(self.low + (self.high - self.low) * uniform_of(self.seed, "guidance", *what), 4)


class PerImageScale(float):
    """Scales of the images of one call, where a pipeline takes one number for all.

    As a number it is the largest, by which a pipeline asks whether to guide at all; multiplied with the difference of
    conditional and null rows it acts row by row: `null + scale * (cond - null)`. What else a pipeline computes with
    its scale it cannot do, and refuses.

    Args:
        scales: One an image, 1 or more.

    Example:
        >>> (PerImageScale([1.0, 3.0]) * torch.ones(2, 1)).flatten().tolist()
        [1.0, 3.0]
    """

    scales: tuple[float, ...]
    used: int

    def __new__(cls, scales: Sequence[float]) -> PerImageScale:
        """The largest, and all of them."""
        made = super().__new__(cls, max(scales))
        made.scales, made.used = tuple(float(scale) for scale in scales), 0
        return made

    def __mul__(self, other: Any) -> Any:
        """Row by row."""
        if not isinstance(other, Tensor):
            return self._refuse(other)
        if other.ndim == 0 or len(other) != len(self.scales):
            raise ValueError(f"{len(self.scales)} guidance scales for a batch of shape {tuple(other.shape)}.")
        self.used += 1
        own = torch.tensor(self.scales, dtype=other.dtype, device=other.device)
        return own.view(-1, *[1] * (other.ndim - 1)) * other

    __rmul__ = __mul__

    def _refuse(self, other: Any) -> Any:
        raise TypeError(
            "This pipeline computes with its guidance scale as one number, which several of a batch are not. Give all "
            "images one scale."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __pow__ = _refuse  # type: ignore[assignment]

    def check_used(self) -> None:
        """Refuse what a pipeline made without having multiplied by the scales.

        Raises:
            RuntimeError: If it guided by one number for all.
        """
        if self > 1 and not self.used and len(set(self.scales)) > 1:
            raise RuntimeError(
                "The pipeline did not multiply by its guidance scale, so that the scales of the images had no effect. "
                "Give all images one scale."
            )


def scale_argument(scales: Sequence[float]) -> float:
    """What to pass as `guidance_scale`: one number where all are equal, else a `PerImageScale`."""
    return scales[0] if len(set(scales)) == 1 else PerImageScale(scales)


__all__ = ["GuidanceSampler", "PerImageScale", "scale_argument"]
