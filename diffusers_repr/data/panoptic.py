"""`PanopticMap`: which segment each pixel of an image belongs to, and which class each segment is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PanopticMap:
    """Segments of one image, none of which overlap.

    Attributes:
        ids: `(H, W)` whole numbers: the id of a segment; 0 where there is none (void).
        classes: Id of each segment -> its class, from 0 on.
        crowds: Ids of segments that are a crowd: many things in one mask, of a truth alone (COCO's `iscrowd`).

    Raises:
        ValueError: For ids without a class, classes without a pixel, and crowds that are no segment.

    Example:
        >>> PanopticMap(torch.tensor([[0, 1], [2, 2]]), {1: 4, 2: 0}).class_map().tolist()
        [[-1, 4], [0, 0]]
    """

    ids: Tensor
    classes: Mapping[int, int]
    crowds: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        ids = torch.as_tensor(self.ids).detach().cpu()
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are whole numbers (H, W); got {tuple(ids.shape)} of {ids.dtype}.")
        found = set(ids.unique().tolist()) - {0}
        for wrong, what in (
            (found - set(self.classes), "are in the map and have no class"),
            (set(self.classes) - found, "have a class and no pixel (0 is void, never a segment)"),
            (set(self.crowds) - set(self.classes), "are crowds and no segments"),
        ):
            if wrong:
                raise ValueError(f"The ids {sorted(wrong)[:5]} {what}.")
        negative = [number for number in self.classes.values() if number < 0]
        if negative:
            raise ValueError(f"Classes are numbered from 0 on; got {negative[0]}.")
        object.__setattr__(self, "ids", ids.long())
        object.__setattr__(self, "classes", dict(self.classes))
        object.__setattr__(self, "crowds", frozenset(self.crowds))

    def class_map(self, void: int = -1) -> Tensor:
        """`(H, W)` int64: the class of each pixel, `void` where there is no segment."""
        found = torch.full_like(self.ids, void)
        for number, label in self.classes.items():
            found[self.ids == number] = label
        return found


__all__ = ["PanopticMap"]
