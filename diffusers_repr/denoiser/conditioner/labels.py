"""`LabelConditioner`: class ids, or nothing for a network without classes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from diffusers_repr.denoiser.condition import Condition, forward_names
from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.inputs import Cache, Conditioned, rows_of


class LabelConditioner(Conditioner):
    """Class ids int64 `(B,)`, by the network's table of classes; a dropped one is the null class's.

    Args:
        null: Id of the null class where the family does not tell (`UNet2DModel`): the last id if None; -1 says that
            there is none.

    Attributes:
        num_classes: Number of classes, the null class not counted; 0 for a network without.
        null_label: Id of the null class, or None.
    """

    kind = "labels"
    argument = "class_labels"
    column = "class_labels"

    def __init__(self, null: int | None = None) -> None:
        self._null = null
        self.num_classes, self.null_label = 0, null

    def bound_to(self, denoiser: Conditioned) -> Self:
        """See `Conditioner`; counts the classes.

        Raises:
            ValueError: For a null class that the table has not.
        """
        bound = super().bound_to(denoiser)
        count, null = denoiser.family.classes()
        if count and null is None:
            if self._null is not None and not -1 <= self._null < count:
                raise ValueError(
                    f"The null class {self._null} is not in the table of {type(denoiser.model).__name__}: its ids are "
                    f"0 to {count - 1}, and -1 says that there is no null class."
                )
            null = None if self._null == -1 else count - 1 if self._null is None else self._null
            count -= self._null != -1
        bound.num_classes, bound.null_label = count, None if null == -1 else null
        return bound

    @property
    def conditional(self) -> bool:
        """Whether there are classes."""
        return self.num_classes > 0

    @property
    def recorded(self) -> bool:
        """See `Conditioner`."""
        return False

    @property
    def has_null(self) -> bool:
        """Whether there is a null class."""
        return self.null_label is not None

    def from_batch(self, batch: Mapping[str, Any], count: int) -> Any:
        """See `Conditioner`; None of a network without classes."""
        return batch[self.column] if self.conditional else None

    def draw_dropped(self, values: Any, chance: float, generator: torch.Generator | None = None) -> Tensor | None:
        """See `Conditioner`."""
        return super().draw_dropped(values, chance, generator) if self.conditional else None

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """The ids, null where they are dropped, under the network's name for them."""
        if not self.conditional:
            return {}
        if dropped is not None:
            values = torch.where(dropped, self._null_id(), values)
        return {self._input(): values, **self._keeps(values)}

    def _input(self) -> str:
        """Name of the network's input of ids."""
        made = self.denoiser.family.from_class_labels(torch.zeros(1, dtype=torch.long))
        names = [name for name, value in made.items() if isinstance(value, Tensor) and value.dtype == torch.long]
        return names[0] if len(names) == 1 else "class_labels"

    def _keeps(self, values: Tensor) -> dict[str, Tensor]:
        """A network that drops labels of its own accord in training mode is told to drop none."""
        if "drop_mask" not in forward_names(self.denoiser.model):
            return {}
        return {"drop_mask": torch.zeros(len(values), dtype=torch.bool, device=values.device)}

    def null(self, count: int = 1) -> dict[str, Any]:
        """See `Conditioner`."""
        if not self.conditional:
            return {}
        return self.inputs(torch.full((count,), self._null_id(), device=self.denoiser.device))

    def _null_id(self) -> int:
        if self.null_label is None:
            raise ValueError(f"This {self._network} has no null class.")
        return self.null_label

    def condition(
        self,
        values: Any,
        batch: int | None = None,
        size: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        negative: str | None = None,
    ) -> Condition:
        """Ids, checked by the family; None is its null class.

        Where the family tells none that is the one named here, or the last id, as in training: a warning says so.
        """
        labels = None if values is None else _labels(values)
        if labels is not None and not len(labels):
            raise ValueError("class_labels is empty; pass one id, or one per image.")
        if labels is None and self.conditional and self.has_null and self.denoiser.family.classes()[1] is None:
            labels = torch.tensor([self._null_id()])
            if self._null is None:
                warnings.warn(
                    f"{self._network} does not tell which class is the null one; without class_labels the last id, "
                    f"{self._null_id()}, is taken, as in training. Name it, or say by -1 that there is none: "
                    f"Denoiser(..., conditioner=LabelConditioner({self._null_id()})).",
                    stacklevel=3,
                )
        inputs = self.denoiser.family.from_class_labels(labels)
        placed = {name: value.to(self.denoiser.device) for name, value in inputs.items()}
        return rows_of(self.denoiser, placed, batch, "class_labels")

    def _refusal(self, name: str) -> str:
        way = "; class-conditional models take class_labels" if self.denoiser.family.conditioning == "class" else ""
        return f"{self._network} takes no {name}{way}."

    def check(self, values: Any) -> None:
        """See `Conditioner`."""
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"A batch has class_labels from {low} to {high}; the model's classes are 0 to {self.num_classes - 1}"
                f"{'' if self.null_label is None else f' (null: {self.null_label})'}. Check label_column, or build "
                "the model with as many classes as the data have."
            )

    def check_dropout(self, chance: float) -> None:
        """See `Conditioner`."""
        if self.conditional and chance > 0 and not self.has_null:
            raise ValueError(
                f"label_dropout={chance} has no null class to drop to; set it to 0, or name one by null_label."
            )

    def check_batch(self, batch: Mapping[str, Any], chance: float) -> None:
        """See `Conditioner`."""
        if not self.conditional:
            return
        if batch.get(self.column) is None:
            raise ValueError(
                f"{self._network} is class-conditional and the data have no class_labels; name a "
                "ClassLabel column by label_column, or build the model with num_classes=0."
            )
        self.check(batch[self.column])

    def check_data(self, data: Any) -> None:
        """The classes of the data must be those of the model.

        Raises:
            ValueError: Naming both numbers.
        """
        classes = getattr(data, "num_classes", None)
        if self.num_classes and classes is not None and classes != self.num_classes:
            raise ValueError(
                f"The data have {classes} classes, {self._network} has {self.num_classes}"
                f"{'' if self.null_label is None else ' and the null class'}; set the model's number of classes to "
                f"{classes}."
            )

    def preview(self, count: int) -> dict[str, Any]:
        """The classes in turn, rows of 8 a class."""
        if not self.conditional:
            return super().preview(count)
        return {"class_labels": [place // 8 % self.num_classes for place in range(count)]}

    def describe(self) -> dict[str, Any]:
        """See `Conditioner`."""
        return {**super().describe(), "num_classes": self.num_classes, "null": self.null_label}


def _labels(class_labels: int | Sequence[int] | Tensor) -> Tensor:
    try:
        labels = torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels are whole numbers, one or one per image; got {class_labels!r}.") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        if not labels.numel():
            return labels.long()
        raise TypeError(f"class_labels are whole numbers, one or one per image; got {class_labels!r}.")
    return labels.long()


__all__ = ["LabelConditioner"]
