"""`Conditioner`: what a network is conditioned on, one place for training, sampling and guidance."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.condition import Condition
from diffusers_repr.denoiser.conditioner.inputs import Cache, Conditioned, rows_of, to_device


class Conditioner(ABC):
    """What a network is conditioned on: where a batch has it, what stands for none of it, and how it enters.

    Made without a model, and bound to one by `Denoiser(..., conditioner=...)` or `denoiser.conditioner = ...`; a
    denoiser that is given none has that of its family. *Values* are what a batch holds: class ids `(B,)`, texts,
    vectors `(B, D)`, token sets `(B, k, D)` or maps `(B, C, H, W)`. A subclass says what the network gets of them.

    Attributes:
        kind: What values are, in one word.
        argument: Argument of `Denoiser.condition` by which they are given.
        column: Where a batch of training data has them.
    """

    kind: ClassVar[str] = "values"
    argument: ClassVar[str] = "values"
    column: str = "condition"
    _denoiser: Conditioned | None = None

    def bound_to(self, denoiser: Conditioned) -> Self:
        """The same for the network of a denoiser."""
        bound = copy.copy(self)
        bound._denoiser = denoiser
        return bound

    @property
    def denoiser(self) -> Conditioned:
        """What it is bound to.

        Raises:
            RuntimeError: Before it is bound.
        """
        if self._denoiser is None:
            raise RuntimeError(f"This {type(self).__name__} is bound to no model; take `denoiser.conditioner`.")
        return self._denoiser

    # What a kind of condition defines

    @abstractmethod
    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """Keyword inputs of the network.

        Args:
            values: One row a sample.
            dropped: `(B,)`, boolean: samples whose condition is the null one; None for none of them.
        """

    @abstractmethod
    def null(self, count: int = 1) -> dict[str, Any]:
        """Keyword inputs of the null condition, as training drops to it and guidance leads away from it.

        Raises:
            ValueError: If there is none.
        """

    @property
    @abstractmethod
    def has_null(self) -> bool:
        """Whether there is a null condition."""

    @abstractmethod
    def check(self, values: Any) -> None:
        """Raise ValueError for values that the network does not take: shape, range."""

    def describe(self) -> dict[str, Any]:
        """What checkpoints and records keep of it: plain data. With another, a run is not gone on with."""
        return {"kind": self.kind, "column": self.column}

    # What all share

    @property
    def conditional(self) -> bool:
        """Whether the network takes a condition at all."""
        return True

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a batch that hold the values."""
        return (self.column,)

    @property
    def map_channels(self) -> int:
        """Channels of the network's input that are no x_t."""
        return 0

    @property
    def recorded(self) -> bool:
        """Whether checkpoints keep `describe()`; not where the network's config tells all of it."""
        return True

    def trained_parts(self) -> dict[str, nn.Module]:
        """Modules of its own that are trained with the network, by their names as components of a pipeline."""
        return {}

    def from_batch(self, batch: Mapping[str, Any], count: int) -> Any:
        """The values of a batch of `count` samples."""
        return batch[self.column]

    def draw_dropped(self, values: Any, chance: float, generator: torch.Generator | None = None) -> Tensor | None:
        """Which samples lose their condition, one draw a sample (Ho and Salimans 2022, arXiv 2207.12598, alg. 1).

        Args:
            values: Of the batch.
            chance: Probability of each; nothing is drawn at 0.
            generator: Of the values' device.
        """
        if chance <= 0:
            return None
        return torch.rand(len(values), device=values.device, generator=generator) < chance

    def condition(
        self,
        values: Any,
        batch: int | None = None,
        size: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        negative: str | None = None,
    ) -> Condition:
        """As `Denoiser.condition`, from values: one row for all or one a sample; None is the null condition."""
        if values is None:
            inputs = self.null()
        else:
            self.check(values)
            inputs = self.inputs(to_device(values, self.denoiser.device))
        return rows_of(self.denoiser, inputs, batch, f"rows of {self.kind}")

    def refuse(self, **given: Any) -> None:
        """Raise ValueError if a condition of another kind was given."""
        for name, value in given.items():
            if name not in (self.argument, f"negative_{self.argument}") and value is not None:
                raise ValueError(self._refusal(name.removeprefix("negative_")))

    def _refusal(self, name: str) -> str:
        return f"{self._network} takes no {name}; it is conditioned on {self.kind}: pass {self.argument}=."

    def check_dropout(self, chance: float) -> None:
        """Raise ValueError if conditions are to be dropped and there is no null to drop to."""
        if self.conditional and chance > 0 and not self.has_null:
            raise ValueError(
                f"label_dropout={chance} has no null {self.kind} to drop to; set it to 0, or give one: "
                f"{type(self).__name__}(null=...)."
            )

    def check_batch(self, batch: Mapping[str, Any], chance: float) -> None:
        """Values must be there, and right.

        Args:
            batch: Of training data.
            chance: Share of the samples whose condition is dropped.

        Raises:
            ValueError: Naming what is missing or wrong.
        """
        if self.column not in batch:
            raise ValueError(
                f"{self._network} is conditioned on {self.kind} and the data have no column {self.column!r}. Give "
                f"batches one, or name theirs: {type(self).__name__}(column=...)."
            )
        self.check(self.from_batch(batch, len(batch[self.column])))

    def check_data(self, data: Any) -> None:  # noqa: B027  (data of most kinds tell nothing beforehand)
        """Raise ValueError unless the data's conditions are those of the model."""

    def preview(self, count: int) -> dict[str, Any]:
        """Arguments of a pipeline's call for `count` previews in training: the null condition by default."""
        return {"batch_size": count}

    @property
    def _network(self) -> str:
        return type(self.denoiser.model).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.describe().items() if k != 'kind')})"


__all__ = ["Conditioner"]
