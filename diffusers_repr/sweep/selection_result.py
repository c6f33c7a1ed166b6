"""What a selection returns: a table of all cells, the best one, sets of layers and levels; saved and read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import Policy
from diffusers_repr.hub import read_json
from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.files import atomic_files, json_text
from diffusers_repr.hub.schema import (
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
from diffusers_repr.sweep.heatmap import draw_heatmap

FORMAT = "diffusers_repr.selection/1"
_NAME, _DIM = text(1000), integer(1, 1 << 31)


def _step(value: Any, at: str) -> list[Any]:
    """`[what was added, score with it]`."""
    added, score = listing(anything(1), 2, 2)(value, at)
    return [_NAME(added, f"{at}[0]"), number()(score, f"{at}[1]")]


_CELL = record(
    {
        "layer": _NAME,
        "order": integer(0, 100_000),
        "timestep": number(),
        "noise": one_of(*get_args(Policy)),
        "nsr": number(0),
        "score": number(),
        "penalty": number(0),
        "flops_share": number(0, 1.001),
        "dim": _DIM,
    },
    {"mean": optional(number()), "std": optional(number(0)), "seed_scores": optional(listing(number(), 1, 10_000))},
)
_SET = record(
    {
        "layers": listing(_NAME, 1, 10_000, distinct=True),
        "timesteps": listing(number(), 1, 10_000, distinct=True),
        "noise": one_of(*get_args(Policy)),
        "score": number(),
        "penalty": number(0),
        "dim": _DIM,
        "steps": listing(_step, 1, 10_000),
        "candidates": listing(_NAME, 1, 10_000),
    }
)
_RECIPE = record(
    {
        "pooling": text(100),
        "batch_size": integer(1, 1_000_000),
        "image_size": optional(either(integer(1, MAX_SIDE), listing(integer(1, MAX_SIDE), 2, 2))),
    },
    others=True,
)
_SCHEMA = record(
    {
        "format": one_of(FORMAT),
        "metric": text(100),
        "seeds": listing(integer(-(2**63), 2**64), 1, 10_000, distinct=True),
        "best": _CELL,
        "sets": mapping(_SET, 0, 100),
        "finalists": listing(_CELL, 1, 100_000),
        "recipe": _RECIPE,
        "cells": listing(_CELL, 1),
    }
)


@dataclass(frozen=True)
class Cell:
    """One layer at one noise level.

    Attributes:
        layer: Full module path.
        order: Place of the layer in execution order, from 0.
        timestep: As the network is told.
        noise: Policy.
        nsr: Noise-to-signal ratio of the level.
        score: Of the best penalty on validation, with the first noise seed; larger is better.
        penalty: Ridge penalty that gave it.
        flops_share: Share of the forward's FLOPs spent when the layer is done.
        dim: Length of the pooled feature.
        mean: Mean score over the noise seeds; None for cells that are no finalists.
        std: Standard deviation of it (n - 1); 0 with one seed.
        seed_scores: Score of each noise seed.
    """

    layer: str
    order: int
    timestep: float
    noise: str
    nsr: float
    score: float
    penalty: float
    flops_share: float
    dim: int
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


@dataclass(frozen=True)
class Selection:
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

    cells: tuple[Cell, ...]
    best: Cell
    finalists: tuple[Cell, ...]
    sets: Mapping[str, FeatureSet]
    metric: str
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """One dictionary a cell, in the order of `cells`."""
        return [asdict(cell) for cell in self.cells]

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
            "image_size": self.recipe["image_size"],
        }
        level = levels[0] if len(levels) == 1 else levels
        return FeatureExtractor(denoiser, layers, level, noise, **{**settings, **changes})

    def heatmap(self) -> bytes:
        """PNG of score by layer and noise level; needs matplotlib."""
        return draw_heatmap(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": FORMAT,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "best": asdict(self.best),
            "sets": {name: asdict(found) for name, found in self.sets.items()},
            "finalists": [asdict(cell) for cell in self.finalists],
            "recipe": dict(self.recipe),
            "cells": self.table(),
        }

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

        folder, buffer = Path(folder), io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.table()), buffer)
        files: dict[str, bytes | str] = {
            "selection.json": json_text(self.to_dict(), folder / "selection.json"),
            "selection.parquet": buffer.getvalue(),
        }
        missing: ImportError | None = None
        if heatmap:
            try:
                files["heatmap.png"] = self.heatmap()
            except ImportError as error:
                missing = error
        atomic_files(folder, files)
        if missing is not None:
            raise missing
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no `selection.json`.
            ValueError: If it is no selection of this format, or says what cannot be; names file and field.
        """
        path = Path(folder) / "selection.json"
        if not path.is_file():
            raise FileNotFoundError(f"No selection in {str(folder)!r}: it has no selection.json.")
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is no selection of format {FORMAT!r}; select again.")
        _SCHEMA(anything(finite=True)(data, str(path)), str(path))
        sets = {name: FeatureSet(**_tuples(found)) for name, found in data["sets"].items()}
        cells, finalists = (tuple(Cell(**_tuples(c)) for c in data[key]) for key in ("cells", "finalists"))
        best = Cell(**_tuples(data["best"]))
        if best not in cells:
            raise ValueError(f"{str(path)!r}: best is none of the cells; select again.")
        return cls(cells, best, finalists, sets, data["metric"], tuple(data["seeds"]), data["recipe"])


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _tuple(v) for k, v in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
