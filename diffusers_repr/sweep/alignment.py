"""What an alignment sweep returns: a score for every layer and level, saved and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.places import short_name
from diffusers_repr.hub.schema import (
    Check,
    anything,
    boolean,
    integer,
    listing,
    mapping,
    number,
    optional,
    record,
    text,
)
from diffusers_repr.metrics.record import MetricRecord
from diffusers_repr.sweep.measure import MEASURES
from diffusers_repr.sweep.picture import Panel, draw_sweep
from diffusers_repr.sweep.result import CELL, NAME, Cell, DrawnResult

_TITLES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
}
_CELL = record({**CELL, "scores": mapping(optional(number()), 1, 100)})
_SAMPLES = record({"name": text(), "samples": integer(1, 10**12), "images_hash": text(200)}, others=True)
_RECIPE = record(
    {
        "model": record({"name": optional(text())}, others=True),
        "encoder": mapping(anything()),
        "features": NAME,
        "data": _SAMPLES,
        "test": optional(_SAMPLES),
        "resize": text(),
        "image_size": listing(integer(1, MAX_SIDE), 2, 2),
        "noise": NAME,
        "sample_posterior": boolean(),
        "seed": integer(-(2**63), 2**64),
        "prompt": optional(text()),
        "class_labels": optional(integer()),
        "settings": mapping(mapping(anything())),
        "backend": mapping(text()),
    },
    others=True,
)
_SCHEMA = record(
    {
        "format": text(100),
        "metrics": listing(NAME, 1, 100, distinct=True),
        "best": optional(_CELL),
        "encoder_scores": mapping(number(), 0, 100),
        "recipe": _RECIPE,
        "cells": listing(_CELL, 1),
    }
)


@dataclass(frozen=True, kw_only=True, repr=False)
class AlignmentCell(Cell):
    """One layer at one noise level, with its scores.

    Attributes:
        scores: Metric -> score; None where it is undefined, as where a layer gives the same for all images.
    """

    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Alignment(DrawnResult):
    """The result of `measure_alignment`.

    Attributes:
        cells: Every cell: level by layer, the least noisy level first, layers in execution order.
        metrics: What was measured: `cknna`, `cka`, `linear`, `knn`.
        encoder_scores: Scores of the encoder's own features under the probes; empty without them.
        recipe: Everything the scores depend on: model, encoder, data, samples, seed, k, protocols, ...
    """

    cells: tuple[AlignmentCell, ...]
    metrics: tuple[str, ...]
    encoder_scores: Mapping[str, float]
    recipe: Mapping[str, Any]

    kind: ClassVar[str] = "alignment"
    fields: ClassVar[Check] = _SCHEMA

    @property
    def best(self) -> AlignmentCell:
        """The cell that scores highest under the first metric."""
        return self.best_of(self.metrics[0])

    def best_of(self, metric: str) -> AlignmentCell:
        """The cell that scores highest; among equals the first.

        Raises:
            ValueError: For a metric that was not measured, or that is undefined everywhere.
        """
        self._check_metric(metric)
        scored = [cell for cell in self.cells if cell.scores[metric] is not None]
        if not scored:
            raise ValueError(f"{metric} is undefined in all {len(self.cells)} cells.")
        return max(scored, key=lambda cell: cell.scores[metric])  # type: ignore[arg-type,return-value]

    def score(self, layer: str, timestep: float, metric: str | None = None) -> float | None:
        """The score of a layer at a level.

        Raises:
            ValueError: For a cell or metric that was not measured.
        """
        metric = self.metrics[0] if metric is None else metric
        self._check_metric(metric)
        return self._cell(layer, timestep).scores[metric]

    def table(self) -> list[dict[str, Any]]:
        """One flat dictionary a cell, in the order of `cells`, for a data frame."""
        return [{**{k: v for k, v in row.items() if k != "scores"}, **row["scores"]} for row in super().table()]

    def record(
        self, metric: str | None = None, layer: str | None = None, timestep: float | None = None
    ) -> MetricRecord:
        """One score as a record; records of unlike sweeps refuse to be compared.

        Args:
            metric: The first if None.
            layer: With `timestep`: of this cell; the best one if both are None.
            timestep: See `layer`.

        Raises:
            ValueError: For what was not measured, an undefined score, or one of `layer` and `timestep` alone.
        """
        metric = self.metrics[0] if metric is None else metric
        self._check_metric(metric)
        if (layer is None) != (timestep is None):
            raise ValueError("Give both layer and timestep, or neither for the best cell.")
        cell = self.best_of(metric) if layer is None or timestep is None else self._cell(layer, timestep)
        value = cell.scores[metric]
        if value is None:
            raise ValueError(f"{metric} of {cell.layer} at {cell.timestep:g} is undefined.")
        recipe = self.recipe
        known = MEASURES.get(metric)
        similarity = known is None or known.needs_encoder
        settings: dict[str, Any] = {
            key: recipe[key] for key in ("noise", "image_size", "prompt", "class_labels", "sample_posterior")
        }
        settings |= recipe["settings"][metric]
        return MetricRecord(
            metric,
            value,
            encoder=recipe["encoder"] if similarity else None,
            features=recipe["features"] if similarity else None,
            counts={"samples": recipe["data"]["samples"]}
            | ({} if similarity else {"test": recipe["test"]["samples"]}),
            reference=recipe["data"]["images_hash"],
            resize=recipe["resize"],
            weights=recipe["encoder"].get("weights") if similarity else None,
            backend=recipe["backend"],
            k=recipe["settings"][metric].get("k"),
            seed=recipe["seed"],
            settings=settings,
            subject=f"{recipe['model']['name']}: {cell.layer} at {cell.timestep:g}",
        )

    def plot(self) -> bytes:
        """PNG with a panel each metric: score by layer and noise level, and beside it the best layers by level.

        A dashed line is the encoder's own score, where it has one; the best cell is marked. Needs matplotlib.
        """
        panels = [
            Panel(
                _TITLES.get(metric, metric),
                {(c.layer, c.timestep): c.scores[metric] for c in self.cells},
                (self.best_of(metric).layer, self.best_of(metric).timestep) if self._any(metric) else None,
                own=self.encoder_scores.get(metric),
            )
            for metric in self.metrics
        ]
        recipe = self.recipe
        model, encoder = (
            short_name(part.get("name") or part.get("class") or "a network")
            for part in (recipe["model"], recipe["encoder"])
        )
        title = f"{model} against {encoder}"
        title += f", {recipe['data']['samples']} images" + (f", k={recipe['k']}" if "cknna" in self.metrics else "")
        title += "; dashed: the encoder's own" if self.encoder_scores else ""
        return draw_sweep(self.cells, panels, title, curves=True)

    def to_dict(self) -> dict[str, Any]:
        """As of every sweep, with the best cell."""
        return {"best": asdict(self.best) if self._any(self.metrics[0]) else None, **super().to_dict()}

    @classmethod
    def _from_dict(cls, data: dict[str, Any], at: str) -> Alignment:
        for index, cell in enumerate(data["cells"]):
            if set(cell["scores"]) != set(data["metrics"]):
                raise ValueError(f"{at!r}: cells[{index}].scores are not those of metrics {data['metrics']}.")
        if not set(data["metrics"]) <= set(data["recipe"]["settings"]):
            raise ValueError(f"{at!r}: recipe.settings lacks one of the metrics {data['metrics']}.")
        cells = tuple(AlignmentCell(**cell) for cell in data["cells"])
        return cls(cells, tuple(data["metrics"]), data["encoder_scores"], data["recipe"])

    def _any(self, metric: str) -> bool:
        return any(cell.scores[metric] is not None for cell in self.cells)

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise ValueError(f"{metric!r} was not measured; measured were {', '.join(self.metrics)}.")

    def _cell(self, layer: str, timestep: float) -> AlignmentCell:
        for cell in self.cells:
            if cell.layer == layer and cell.timestep == timestep:
                return cell
        layers = list(dict.fromkeys(cell.layer for cell in self.cells))
        levels = list(dict.fromkeys(cell.timestep for cell in self.cells))
        raise ValueError(f"No cell {layer!r} at {timestep!r}; layers are {layers}, timesteps are {levels}.")
