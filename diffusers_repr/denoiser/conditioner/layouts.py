"""`LayoutConditioner`: where things are, and what they are: boxes and masks of pixels (self-guided diffusion)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.inputs import Conditioned
from diffusers_repr.denoiser.conditioner.labels import LabelConditioner
from diffusers_repr.denoiser.conditioner.several import SeveralConditioner
from diffusers_repr.denoiser.conditioner.tensors import MapConditioner, VectorConditioner

NOTHING = 255


class LayoutConditioner(SeveralConditioner):
    """Class ids of pixels, int64 `(B, H, W)`, as channels beside x_t and as what is there (arXiv 2210.06462).

    The network tells how, by its channels beside x_0 and by what it is told of classes:

    - *masks*: S channels, one a class, and the set of the classes that are there, `(B, S)` of 0 and 1. It is filled up
      by zeros and added to the time embedding (`class_embed_type="identity"`).
    - *box*: one channel, 1 inside the box, and its class by the network's table, whose last id is the null one. The
      pixels of a box have its class, those outside none; an image has one box at most.

    A sample loses both by one draw. An image without any class has the null condition: a map of zeros with no class,
    or with the null id.

    Args:
        nothing: Id of pixels of no class; ids below 0 are none either.
        column: Of a batch of training data.
        size: (h, w) of x_0, to which layouts are brought; as the network was made for if None.

    Attributes:
        classes: Number of classes; known when it is bound.
    """

    kind = "layouts"
    column = "masks"

    def __init__(self, nothing: int = NOTHING, column: str = "masks", size: tuple[int, int] | None = None) -> None:
        self.nothing, self.column, self.size, self.classes = nothing, column, size, 0
        self.parts = ()

    def bound_to(self, denoiser: Conditioned) -> Self:
        """See `Conditioner`.

        Raises:
            ValueError: For a network that takes no layouts.
        """
        bound = Conditioner.bound_to(self, denoiser)
        family, name = denoiser.family, type(denoiser.model).__name__
        maps, labels, vector = family.map_channels(), LabelConditioner(), family.vector_input()
        if not maps or (vector is None and not family.classes()[0]):
            raise ValueError(
                f"This {name} takes no layouts: for masks of S classes it needs S input channels more than it "
                "predicts and class_embed_type='identity'; for boxes of K classes one more and num_class_embeds=K + 1."
            )
        if vector is None and maps != 1:
            raise ValueError(f"A box is one channel beside x_0, and this {name} has {maps}.")
        kind: Conditioner = labels if vector is None else VectorConditioner(null=0.0)
        bound.parts = (MapConditioner(maps).bound_to(denoiser), kind.bound_to(denoiser))
        bound.classes = maps if vector is not None else bound.parts[1].num_classes  # type: ignore[attr-defined]
        width = None if vector is None else bound.parts[1].channels()  # type: ignore[attr-defined]
        if width is not None and maps > width:
            raise ValueError(f"{maps} classes do not fit the time embedding of this {name}, which has {width} values.")
        return bound

    @property
    def boxes(self) -> bool:
        """Whether the network takes boxes, with a class each."""
        return isinstance(self.parts[1], LabelConditioner)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Conditioner`."""
        return (self.column,)

    def from_batch(self, batch: Mapping[str, Any], count: int) -> Any:
        """See `Conditioner`."""
        return batch[self.column]

    def draw_dropped(self, values: Any, chance: float, generator: torch.Generator | None = None) -> Tensor | None:
        """See `Conditioner`."""
        return Conditioner.draw_dropped(self, values, chance, generator)

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """See `Conditioner`."""
        return super().inputs(self.maps_and_classes(values), dropped)

    def maps_and_classes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is told of layouts `(B, H, W)`: maps `(B, C, h, w)`, and class ids `(B,)` or sets `(B, D)`.

        A pixel of x_0 has the class of the nearest one.
        """
        values = resized(values.long(), self.size or self.denoiser.family.size())
        values = values.masked_fill(values == self.nothing, -1)
        if self.boxes:
            ids = values.flatten(1).amax(1)
            null = self.parts[1].null_label  # type: ignore[attr-defined]
            return (values >= 0).float()[:, None], ids.masked_fill(ids < 0, -1 if null is None else null)
        maps = one_hot_maps(values, self.classes)
        width = self.parts[1].channels()  # type: ignore[attr-defined]
        return maps, torch.nn.functional.pad(maps.amax((2, 3)), (0, width - self.classes))

    def check(self, values: Any) -> None:
        """See `Conditioner`; of boxes also that an image has one class at most.

        Raises:
            TypeError: For what is no tensor.
            ValueError: For another shape, and ids that are no classes.
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"layouts are a tensor of class ids (B, H, W); got {type(values).__name__}.")
        whole = not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool
        if values.ndim != 3 or not whole or not values.numel():
            raise ValueError(
                f"layouts are class ids (B, H, W), whole numbers; got {tuple(values.shape)}, {values.dtype}."
            )
        values = values.long()
        there = (values >= 0) & (values != self.nothing)
        most = int(values.masked_fill(~there, -1).max())
        if most >= self.classes:
            raise ValueError(
                f"A layout has the class {most}; those of this {self._network} are 0 to {self.classes - 1}, and "
                f"{self.nothing} where there is none."
            )
        if self.boxes:
            high = values.masked_fill(~there, -1).flatten(1).amax(1)
            low = values.masked_fill(~there, self.classes).flatten(1).amin(1)
            if bool(((low < high) & (high >= 0)).any()):
                raise ValueError("A layout has more than one class, and this network takes one box an image.")

    def check_batch(self, batch: Mapping[str, Any], chance: float) -> None:
        """See `Conditioner`."""
        Conditioner.check_batch(self, batch, chance)

    def check_data(self, data: Any) -> None:
        """See `Conditioner`."""

    def describe(self) -> dict[str, Any]:
        """See `Conditioner`."""
        level = "box" if self.boxes else "masks"
        return {"kind": self.kind, "column": self.column, "level": level, "classes": self.classes}

    def preview(self, count: int) -> dict[str, Any]:
        """See `Conditioner`."""
        return Conditioner.preview(self, count)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Class ids of pixels `(B, H, W)` at another size, each that of the nearest pixel; exact, in whole numbers.

    Example:
        >>> resized(torch.tensor([[[1, 2], [3, 4]]]), (1, 4))
        tensor([[[3, 3, 4, 4]]])
    """
    if tuple(values.shape[1:]) == tuple(size):
        return values
    rows, columns = (
        ((torch.arange(to, device=values.device) + 0.5) * (given / to)).long().clamp(max=given - 1)
        for to, given in zip(size, values.shape[1:], strict=True)
    )
    return values[:, rows][:, :, columns]


def one_hot_maps(values: Tensor, classes: int) -> Tensor:
    """Class ids of pixels `(B, H, W)` to maps `(B, classes, H, W)` of 0 and 1, float32; ids out of range are in none.

    Example:
        >>> one_hot_maps(torch.tensor([[[0, 2, 255]]]), 3)[0, :, 0]
        tensor([[1., 0., 0.],
                [0., 0., 0.],
                [0., 1., 0.]])
    """
    return (values[:, None] == torch.arange(classes, device=values.device).view(1, -1, 1, 1)).float()


__all__ = ["NOTHING", "LayoutConditioner", "one_hot_maps", "resized"]
