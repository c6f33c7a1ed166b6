"""Scoring the cells of an alignment sweep, pass by pass, shared between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.features.extraction import process_state
from diffusers_repr.heads.fitting.protocols import PROTOCOLS, Protocol
from diffusers_repr.metrics.checks import UndefinedScoreError
from diffusers_repr.metrics.cka import cka
from diffusers_repr.metrics.cknna import NeighbourGraph, compare_graphs, neighbour_graph
from diffusers_repr.metrics.gather import failing_together
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.alignment_read import Pass, Reader, SetFeatures
from diffusers_repr.sweep.probes import knn_probe, linear_probe

METRICS = ("cknna", "cka", "linear", "knn")
PROBES = ("linear", "knn")


@dataclass(frozen=True)
class Settings:
    """How features are scored; see `measure_alignment`."""

    metrics: tuple[str, ...]
    k: int
    knn_k: int
    protocol: Protocol
    symmetric: bool
    clamp_quantile: float | None
    seed: int

    def of(self, metric: str) -> dict[str, Any]:
        """What a metric depends on, as plain values."""
        clamp = {"clamp_quantile": self.clamp_quantile}
        knn = PROTOCOLS["knn"].replace(k=self.knn_k)
        found: dict[str, dict[str, Any]] = {
            "cknna": {"k": self.k, "symmetric": self.symmetric, **clamp},
            "cka": {"unbiased": True, **clamp},
            "linear": {"protocol": self.protocol.describe()},
            "knn": {"k": self.knn_k, "protocol": knn.describe()},
        }
        return found[metric]


@dataclass(frozen=True)
class Samples:
    """Images that are compared on.

    Attributes:
        images: The data set.
        rows: Which of them.
        labels: Class ids of these rows; None without.
    """

    images: ImageRows
    rows: list[int]
    labels: Tensor | None


class Sweep:
    """The work of `measure_alignment`, pass by pass.

    Args:
        reader: How images are read.
        settings: How features are scored.
        train: Images of similarities, and to fit probes on.
        held: Images to measure probes on.
        levels: Noise levels.
    """

    def __init__(
        self, reader: Reader, settings: Settings, train: Samples, held: Samples | None, levels: list[NoiseLevel]
    ) -> None:
        self.reader, self.settings, self.train, self.held, self.levels = reader, settings, train, held, levels
        where = reader.denoiser.device
        self.device = where if where.type in ("cpu", "cuda") else torch.device("cpu")  # scores need float64
        self.read: SetFeatures | None = None  # the first pass, which has the encoder's features
        self.read_held: SetFeatures | None = None
        self.graph: NeighbourGraph | None = None
        self.undefined: dict[tuple[str, str], dict[str, None]] = {}  # (metric, why) -> layers

    def run(self, passes: Sequence[Pass]) -> tuple[dict[tuple[str, int], dict[str, float | None]], dict[str, float]]:
        """Scores by layer and index of the level, and the encoder's own under the probes."""
        scores: dict[tuple[str, int], dict[str, float | None]] = {}
        own: dict[str, float] = {}
        for part in passes:
            first = self.read is None
            train = self.reader.read(self.train.images, self.train.rows, part, self.levels, first)
            held = None
            if self.held is not None:
                held = self.reader.read(self.held.images, self.held.rows, part, self.levels, first)
            if first:
                self.read, self.read_held = train, held
                if held is not None:
                    tell_overlap(train.keys, held.keys, "data", "test")
                own = self._start(train, held)
            scores |= self._score(part, train, held)
        return scores, own

    def _start(self, train: SetFeatures, held: SetFeatures | None) -> dict[str, float]:
        """What is needed of the encoder's features for every cell; their own scores under the probes."""
        assert train.encoder is not None
        if "cknna" in self.settings.metrics:
            self.graph = self._graph(train.encoder.to(self.device))
        return {
            metric: self._probe(metric, train.encoder, held.encoder)
            for metric in self.settings.metrics
            if metric in PROBES and held is not None and held.encoder is not None
        }

    def _score(
        self, part: Pass, train: SetFeatures, held: SetFeatures | None
    ) -> dict[tuple[str, int], dict[str, float | None]]:
        from accelerate.utils import gather_object

        state = process_state()
        cells = [(path, at, level) for path in part.layers for at, level in enumerate(part.levels)]
        found = []
        with failing_together():
            for path, at, level in cells[state.process_index :: state.num_processes]:
                features = train.denoiser[path][at].to(self.device)
                test = None if held is None else held.denoiser[path][at].to(self.device)
                found.append(((path, level), {m: self._one(m, features, test, path) for m in self.settings.metrics}))
        return dict(gather_object(found) if state.num_processes > 1 else found)

    def _one(self, metric: str, features: Tensor, test: Tensor | None, path: str) -> float | None:
        assert self.read is not None
        assert self.read.encoder is not None
        try:
            if metric == "cknna":
                assert self.graph is not None
                return compare_graphs(self._graph(features), self.graph, symmetric=self.settings.symmetric)
            if metric == "cka":
                return cka(features, self.read.encoder, clamp_quantile=self.settings.clamp_quantile)
        except UndefinedScoreError as error:
            self.undefined.setdefault((metric, str(error)), {})[path] = None
            return None
        assert test is not None
        return self._probe(metric, features, test)

    def _graph(self, features: Tensor) -> NeighbourGraph:
        return neighbour_graph(features, self.settings.k, clamp_quantile=self.settings.clamp_quantile)

    def _probe(self, metric: str, features: Tensor, test: Tensor) -> float:
        assert self.held is not None
        assert self.train.labels is not None
        assert self.held.labels is not None
        data = (features, self.train.labels, test, self.held.labels)
        if metric == "knn":
            return knn_probe(*data, k=self.settings.knn_k).accuracy
        return linear_probe(*data, protocol=self.settings.protocol, seed=self.settings.seed).accuracy
