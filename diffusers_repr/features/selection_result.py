"""What a selection returns: a table of all cells, the best one, sets of layers and levels; saved and read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.heatmap import draw_heatmap
from diffusers_repr.hub import read_json
from diffusers_repr.hub.files import atomic_files, json_text
from diffusers_repr.noise import NoiseLevel

FORMAT = "diffusers_repr.selection/1"


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
            folder: Made if missing; files of these names are replaced, all at once.
            heatmap: Whether to draw the picture.

        Raises:
            ImportError: If matplotlib is missing; the other two files are written before.
            OSError: If the disk is full or the folder cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.table()), buffer)
        files: dict[str, bytes | str] = {
            "selection.json": json_text(folder / "selection.json", self.to_dict()),
            "selection.parquet": buffer.getvalue(),
        }
        try:
            if heatmap:
                files["heatmap.png"] = self.heatmap()
        finally:
            atomic_files(folder, files)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no `selection.json`.
            ValueError: If it is no selection of this format.
        """
        path = Path(folder) / "selection.json"
        if not path.is_file():
            raise FileNotFoundError(f"No selection in {str(folder)!r}: it has no selection.json.")
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is no selection of format {FORMAT!r}; select again.")
        sets = {name: FeatureSet(**_tuples(found)) for name, found in data["sets"].items()}
        cells, finalists = (tuple(Cell(**_tuples(c)) for c in data[key]) for key in ("cells", "finalists"))
        best = Cell(**_tuples(data["best"]))
        return cls(cells, best, finalists, sets, data["metric"], tuple(data["seeds"]), data["recipe"])


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _tuple(v) for k, v in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
