"""`FeatureMap`: what a layer gave for a batch of images, and the one conversion between tokens and maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMap:
    """Features on the grid of an image or a video.

    Attributes:
        values: As the layer gave them: tokens `(..., N, C)`, or a map `(..., C, *grid)`.
        grid: `(h, w)`; of a video `(frames, h, w)`. Tokens lie frame by frame, row by row.
        start: First token of the image; what stands in front and behind is text, or a vision transformer's class and
            register tokens.
        class_at: Which token of the sequence is the class token (0, or -1 for one behind the image's); None: none.
        is_map: Whether `values` is a map.

    Raises:
        ValueError: If the values do not fit the grid.

    Example:
        >>> import torch
        >>> found = FeatureMap(torch.zeros(2, 7 + 24, 8), grid=(4, 6), start=7)
        >>> found.as_map().shape, found.tokens().shape
        (torch.Size([2, 8, 4, 6]), torch.Size([2, 24, 8]))
    """

    values: Tensor
    grid: tuple[int, ...]
    start: int = 0
    class_at: int | None = None
    is_map: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        fits = (
            shape[-len(self.grid) :] == self.grid
            if self.is_map
            else len(shape) > 1 and shape[-2] >= self.start + math.prod(self.grid) + (self.class_at == -1)
        )
        if not fits:
            what = "A map" if self.is_map else "Tokens"
            raise ValueError(
                f"{what} {shape} do not fit a grid of {' x '.join(map(str, self.grid))}"
                + (f" from token {self.start} on." if self.start else ".")
            )

    @classmethod
    def from_map(cls, value: Tensor, axes: int = 2) -> FeatureMap:
        """Of a map `(..., C, *grid)` whose grid has so many axes: 2, or 3 for a video."""
        return cls(value, tuple(value.shape[-axes:]), is_map=True)

    def as_map(self) -> Tensor:
        """`(..., C, *grid)`, a view; tokens of text and class are left out."""
        return self.values if self.is_map else self.tokens().transpose(-1, -2).unflatten(-1, self.grid)

    def tokens(self) -> Tensor:
        """The image's tokens `(..., h * w, C)`, row by row, a view; tokens of text and class are left out."""
        if self.is_map:
            return self.values.flatten(-len(self.grid)).transpose(-1, -2)
        return self.values[..., self.start : self.start + math.prod(self.grid), :]

    def class_token(self) -> Tensor | None:
        """`(..., C)`, or None where the sequence has none."""
        return None if self.class_at is None else self.values[..., self.class_at, :]

    def with_map(self, value: Tensor) -> FeatureMap:
        """Another map `(..., C, *grid)` of any size in place of the image's; the class token stays with it."""
        found, token = FeatureMap.from_map(value, len(self.grid)), self.class_token()
        if token is None:
            return found
        sequence = torch.cat([found.tokens(), token.unsqueeze(-2)], dim=-2)
        return replace(found, values=sequence, class_at=-1, is_map=False)

    def __repr__(self) -> str:
        return f"FeatureMap({tuple(self.values.shape)}, grid={self.grid}, start={self.start})"


__all__ = ["FeatureMap"]
