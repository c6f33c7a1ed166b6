"""What a selection returns: a table of all cells, the best one, sets of layers and levels; saved and read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import Policy
from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.schema import (
    Check,
    anything,
    either,
    integer,
    listing,
    mapping,
    number,
    one_of,
    optional,
    record,
    text,
)
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.picture import Panel, draw_sweep
from diffusers_repr.sweep.result import CELL, NAME, Cell, SweepResult, tuples


@dataclass(frozen=True)
class _Shown:
    """How people read a metric: `factor * score`, with so many digits in a title and in a cell."""

    title: str
    factor: int = 1
    digits: int = 3
    unit: str = ""
    in_cell: int = 2

    @property
    def name(self) -> str:
        """The title without what stands in brackets."""
        return self.title.split(" (")[0]


_PLAIN = {
    "accuracy": _Shown("validation accuracy (%)", 100, 1, " %", 1),
    "balanced_accuracy": _Shown("validation accuracy, mean over classes (%)", 100, 1, " %", 1),
    "neg_brier": _Shown("Brier score on validation (lower is better)", -1),
    "r2": _Shown("validation R²"),
    "pck": _Shown("PCK, correct key points (%)", 100, 1, " %", 1),
    "neg_mse": _Shown("mean squared error on validation (lower is better)", -1),
}


def _step(value: Any, at: str) -> list[Any]:
    """`[what was added, score with it]`."""
    added, score = listing(anything(1), 2, 2)(value, at)
    return [NAME(added, f"{at}[0]"), number()(score, f"{at}[1]")]


_CELL = record(
    {**CELL, "noise": one_of(*get_args(Policy)), "score": number(), "penalty": number(0)},
    {"mean": optional(number()), "std": optional(number(0)), "seed_scores": optional(listing(number(), 1, 10_000))},
)
_SET = record(
    {
        "layers": listing(NAME, 1, 10_000, distinct=True),
        "timesteps": listing(number(), 1, 10_000, distinct=True),
        "noise": one_of(*get_args(Policy)),
        "score": number(),
        "penalty": number(0),
        "dim": CELL["dim"],
        "steps": listing(_step, 1, 10_000),
        "candidates": listing(NAME, 1, 10_000),
    }
)
_RECIPE = record(
    {
        "pooling": optional(text(100)),
        "batch_size": integer(1, 1_000_000),
        "image_size": optional(either(integer(1, MAX_SIDE), listing(integer(1, MAX_SIDE), 2, 2))),
    },
    others=True,
)
_SCHEMA = record(
    {
        "format": text(100),
        "metric": text(100),
        "seeds": listing(integer(-(2**63), 2**64), 1, 10_000, distinct=True),
        "best": _CELL,
        "sets": mapping(_SET, 0, 100),
        "finalists": listing(_CELL, 1, 100_000),
        "recipe": _RECIPE,
        "cells": listing(_CELL, 1),
    }
)


@dataclass(frozen=True, kw_only=True, repr=False)
class SelectionCell(Cell):
    """One layer at one noise level, with its score.

    Attributes:
        noise: Policy.
        score: On validation, with the first noise seed, of the best penalty where there are some; larger is better.
        penalty: That gave it; 0 where nothing is fitted in closed form.
        mean: Mean score over the noise seeds; None for cells that are no finalists.
        std: Standard deviation of it (n - 1); 0 with one seed.
        seed_scores: Score of each noise seed.
    """

    noise: str
    score: float
    penalty: float
    mean: float | None = None
    std: float | None = None
    seed_scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class FeatureSet:
    """Features of several layers or levels, side by side.

    Attributes:
        layers: Paths.
        timesteps: Levels; every layer is read at every one.
        noise: Policy.
        score: On validation.
        penalty: Ridge penalty that gave it.
        dim: Length of the joined feature.
        steps: `(what was added, score with it)`, in order.
        candidates: What was to choose from.
    """

    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    noise: str
    score: float
    penalty: float
    dim: int
    steps: tuple[tuple[str, float], ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Selection(SweepResult):
    """The result of `select_features`.

    Attributes:
        cells: Every cell: noise policy by level by layer.
        best: The best cell.
        finalists: The best few, scored with every noise seed, best first.
        sets: `layers`: greedy set at the best level; `levels`: greedy set of levels for these layers.
        metric: Name.
        seeds: Of the noise.
        recipe: Everything else that was asked for or found: model, data, pooling, classes, forwards, ...
    """

    cells: tuple[SelectionCell, ...]
    best: SelectionCell
    finalists: tuple[SelectionCell, ...]
    sets: Mapping[str, FeatureSet]
    metric: str
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]

    kind: ClassVar[str] = "selection"
    fields: ClassVar[Check] = _SCHEMA

    def extractor(self, denoiser: Denoiser, use: str = "best", **changes: Any) -> FeatureExtractor:
        """A `FeatureExtractor` for what was selected, with the pooling and noise of the selection.

        Args:
            denoiser: The same model.
            use: `best` (one layer, one level), `layers` or `levels` (the greedy sets).
            **changes: Other settings of `FeatureExtractor`.

        Raises:
            ValueError: For another `use`.
        """
        if use == "best":
            layers, timesteps, noise = [self.best.layer], [self.best.timestep], self.best.noise
        elif use in self.sets:
            found = self.sets[use]
            layers, timesteps, noise = list(found.layers), list(found.timesteps), found.noise
        else:
            raise ValueError(f"use={use!r}; expected one of {', '.join(('best', *self.sets))}.")
        levels = [NoiseLevel(timestep=t) for t in timesteps]
        settings: dict[str, Any] = {
            "pooling": self.recipe["pooling"],
            "batch_size": self.recipe["batch_size"],
            "seed": self.seeds[0],
            "image_size": "keep" if self.recipe["image_size"] is None else self.recipe["image_size"],
        }
        level = levels[0] if len(levels) == 1 else levels
        return FeatureExtractor(denoiser, layers, level, noise, **{**settings, **changes})

    def __repr__(self) -> str:
        best, (metric, sign) = self.best, self.in_words()
        return (
            f"Selection(best {best.layer!r} at timestep {best.timestep:g}, noise={best.noise!r}: "
            f"{metric} {sign * best.score:.4g},\n"
            f"    {len(self.cells)} cells, {len(self.finalists)} finalists, sets of {', '.join(self.sets) or 'none'}, "
            f"model={self.recipe.get('model')!r})"
        )

    def in_words(self) -> tuple[str, int]:
        """The metric as people read it, and the sign of scores then: losses, held with a minus, are positive."""
        shown = _PLAIN.get(self.metric)
        return (self.metric, 1) if shown is None or shown.factor > 0 else (shown.name, -1)

    def heatmap(self) -> bytes:
        """PNG of score by layer (rows, in execution order) and noise level, a panel each policy; needs matplotlib.

        A frame marks the best cell. Accuracies are in percent; losses, which scores hold with a minus, positive.
        """
        shown, best = _PLAIN.get(self.metric, _Shown(self.metric)), self.best
        policies = list(dict.fromkeys(cell.noise for cell in self.cells))
        panels = [
            Panel(
                f"noise: {policy}" if len(policies) > 1 else "",
                {(c.layer, c.timestep): shown.factor * c.score for c in self.cells if c.noise == policy},
                (best.layer, best.timestep) if best.noise == policy else None,
                clean=policy == "clean",
            )
            for policy in policies
        ]
        value = f"{shown.factor * best.score:.{shown.digits}f}{shown.unit}"
        if best.mean is not None and best.std is not None and len(self.seeds) > 1:
            spread = f"{abs(shown.factor) * best.std:.{shown.digits}f}{shown.unit}"
            value = f"{shown.factor * best.mean:.{shown.digits}f} ± {spread} over {len(self.seeds)} noise seeds"
        title = f"best: {best.layer} at timestep {best.timestep:g} (noise: {best.noise}), {shown.name} {value}"
        style = f"{{:.{shown.in_cell}f}}"
        return draw_sweep(self.cells, panels, title, shown.title, style, lower_is_better=shown.factor < 0)

    def save(self, folder: str | Path, heatmap: bool = True) -> Path:
        """Write `selection.json`, `selection.parquet` (the cells) and `heatmap.png` into a folder.

        If it fails, the folder is as it was, and the selection can be saved to another place.

        Args:
            folder: Made if missing; files of these names are replaced together, when all are whole.
            heatmap: Whether to draw the picture.

        Raises:
            ImportError: If matplotlib is missing; the other two files are written before.
            OSError: If the disk is full; what was in the folder stays as it was, and saving again may succeed.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.table()), buffer)
        more = {"selection.parquet": buffer.getvalue()}
        return self._save(folder, more, ("heatmap.png", self.heatmap) if heatmap else None)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], at: str) -> Selection:
        sets = {name: FeatureSet(**_plain(found)) for name, found in data["sets"].items()}
        cells, finalists = (tuple(SelectionCell(**_plain(c)) for c in data[key]) for key in ("cells", "finalists"))
        best = SelectionCell(**_plain(data["best"]))
        if best not in cells:
            raise ValueError(f"{at!r}: best is none of the cells; select again.")
        return cls(cells, best, finalists, sets, data["metric"], tuple(data["seeds"]), data["recipe"])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuples(value) for name, value in values.items()}
