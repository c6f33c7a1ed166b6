"""What a comparison of several denoisers with several encoders returns: a score for every layer, saved and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers_repr.hub.schema import Check, anything, integer, listing, mapping, number, optional, record, text
from diffusers_repr.sweep.align_curves import draw_comparison
from diffusers_repr.sweep.result import CELL, NAME, Cell, DrawnResult

_CELL = record({**CELL, "model": NAME, "encoder": NAME, "score": optional(number())})
_MODEL = record(
    {
        "parameters": integer(0, 10**15),
        "step": optional(number(0, 1e15)),
        "name": optional(text()),
        "revision": optional(text()),
        "class": text(),
        "weights": optional(text()),
    }
)
_SCHEMA = record(
    {
        "format": text(100),
        "metric": NAME,
        "models": mapping(_MODEL, 1, 10_000),
        "encoders": mapping(mapping(anything()), 1, 1000),
        "between": mapping(mapping(optional(number())), 0, 1000),
        "recipe": mapping(anything()),
        "cells": listing(_CELL, 1),
    }
)


@dataclass(frozen=True, kw_only=True)
class ComparisonCell(Cell):
    """One layer of one model at one noise level, against one encoder.

    Attributes:
        model: Its label.
        encoder: Its name.
        score: None where it is undefined.
    """

    model: str
    encoder: str
    score: float | None


@dataclass(frozen=True)
class AlignmentComparison(DrawnResult):
    """The result of `compare_alignments`.

    Attributes:
        cells: Model by model, encoder by encoder; of each level by layer, as in an `Alignment`.
        metric: What was measured.
        models: Label -> `parameters` (their number), `step` of its training (None if not told), `name`, `class`, ...
        encoders: Name -> fingerprint.
        between: Encoder -> other encoder -> score of the other's features against those of the first: how near two
            encoders are to each other, to see the denoisers' scores by.
        recipe: What else the scores depend on: data, seed, k, ...
    """

    cells: tuple[ComparisonCell, ...]
    metric: str
    models: Mapping[str, Mapping[str, Any]]
    encoders: Mapping[str, Mapping[str, Any]]
    between: Mapping[str, Mapping[str, float | None]]
    recipe: Mapping[str, Any]

    kind: ClassVar[str] = "alignments"
    fields: ClassVar[Check] = _SCHEMA

    def cells_of(self, model: str, encoder: str) -> list[ComparisonCell]:
        """All cells of a model against an encoder.

        Raises:
            ValueError: For one that was not compared.
        """
        for kind, name, known in (("model", model, self.models), ("encoder", encoder, self.encoders)):
            if name not in known:
                raise ValueError(f"No {kind} {name!r} was compared; there are {', '.join(known)}.")
        return [cell for cell in self.cells if (cell.model, cell.encoder) == (model, encoder)]

    def best_of(self, model: str, encoder: str) -> ComparisonCell:
        """The cell of a model that scores highest against an encoder; among equals the first.

        Raises:
            ValueError: For one that was not compared, or that has no score at all.
        """
        if not self.is_defined(model, encoder):
            raise ValueError(f"{self.metric} of {model!r} against {encoder!r} is undefined in all cells.")
        scored = [cell for cell in self.cells_of(model, encoder) if cell.score is not None]
        return max(scored, key=lambda cell: cell.score)  # type: ignore[arg-type,return-value]

    def is_defined(self, model: str, encoder: str) -> bool:
        """Whether any cell of a model has a score against an encoder."""
        return any(cell.score is not None for cell in self.cells_of(model, encoder))

    def best(self) -> list[dict[str, Any]]:
        """A row for every model and encoder: its step and parameters, and the best cell's layer, level and score.

        Those that are undefined in all cells have no row.
        """
        return [
            {
                "model": label,
                "encoder": encoder,
                "step": about["step"],
                "parameters": about["parameters"],
                "layer": cell.layer,
                "timestep": cell.timestep,
                "score": cell.score,
            }
            for encoder in self.encoders
            for label, about in self.models.items()
            if self.is_defined(label, encoder)
            for cell in [self.best_of(label, encoder)]
        ]

    def plot(self) -> bytes:
        """PNG with a row of two panels each encoder. Needs matplotlib.

        Left: score by depth, a curve each model, at the level of its best cell. Right: the best score of each model
        by the step of its training if all have one, one line each size, else by its number of parameters. Dashed: the
        other encoders' own scores against this one.
        """
        return draw_comparison(self)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], at: str) -> AlignmentComparison:
        for index, cell in enumerate(data["cells"]):
            if cell["model"] not in data["models"] or cell["encoder"] not in data["encoders"]:
                raise ValueError(f"{at!r}: cells[{index}] is of a model or encoder that is not listed.")
        cells = tuple(ComparisonCell(**cell) for cell in data["cells"])
        own = (data[name] for name in ("metric", "models", "encoders", "between", "recipe"))
        return cls(cells, *own)


__all__ = ["AlignmentComparison", "ComparisonCell"]
