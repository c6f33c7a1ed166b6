"""Measures of kept features: nearness to an encoder, and how well classes are told apart by probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffusers_repr.heads.fitting.protocols import PROTOCOLS, Protocol
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.cka import cka
from diffusers_repr.metrics.cknna import NeighbourGraph, compare_graphs, neighbour_graph
from diffusers_repr.sweep.measure import Bench, Held, Measure, register_measure
from diffusers_repr.sweep.probes import knn_probe, linear_probe


@register_measure("cknna")
@dataclass(frozen=True)
class CKNNA(Measure):
    """See `diffusers_repr.metrics.cknna`; the encoder's neighbours are found once for all cells."""

    k: int = 10
    symmetric: bool = True
    clamp_quantile: float | None = None
    unbiased: bool = True
    normalize_rows: bool = True
    eps: float = 0.0

    roles: ClassVar[tuple[str, ...]] = ("train",)
    needs_encoder: ClassVar[bool] = True

    def check(self, bench: Bench) -> None:
        """K has to leave a row out, if the estimator is unbiased."""
        check_whole("k", self.k, 1, len(bench.splits["train"]) - self.unbiased)

    def describe(self) -> dict[str, Any]:
        """Every field; the later ones where they are not as they always were, so that older records compare."""
        usual = {"unbiased": True, "normalize_rows": True, "eps": 0.0}
        return {key: value for key, value in super().describe().items() if usual.get(key, ...) != value}

    def score(self, cell: Held) -> float:
        """About 0 to 1."""
        shared = cell.bench.shared
        if self not in shared:
            shared[self] = self._graph(cell.bench.reference["train"].to(cell.train.device))
        return compare_graphs(self._graph(cell.train), shared[self], symmetric=self.symmetric, eps=self.eps)

    def _graph(self, features: Tensor) -> NeighbourGraph:
        settings = {name: getattr(self, name) for name in ("unbiased", "normalize_rows", "clamp_quantile")}
        return neighbour_graph(features, self.k, **settings)


@register_measure("cka")
@dataclass(frozen=True)
class CKA(Measure):
    """See `diffusers_repr.metrics.cka`."""

    clamp_quantile: float | None = None

    roles: ClassVar[tuple[str, ...]] = ("train",)
    needs_encoder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """With the estimator."""
        return {"unbiased": True, "clamp_quantile": self.clamp_quantile}

    def score(self, cell: Held) -> float:
        """About 0 to 1."""
        return cka(cell.train, cell.bench.reference["train"], clamp_quantile=self.clamp_quantile)


@dataclass(frozen=True)
class _Probe(Measure):
    """Accuracy of a probe that is fitted on `train` and measured on `held`."""

    needs_labels: ClassVar[bool] = True

    @staticmethod
    def data(cell: Held) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of both splits."""
        assert cell.held is not None
        splits = cell.bench.splits
        return cell.train, splits["train"].targets, cell.held, splits["held"].targets


@register_measure("linear")
@dataclass(frozen=True)
class LinearAccuracy(_Probe):
    """See `linear_probe`."""

    protocol: Protocol = PROTOCOLS["ridge"]
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """Every field of the protocol."""
        return {"protocol": self.protocol.describe()}

    def score(self, cell: Held) -> float:
        """Share of images told right."""
        return linear_probe(*self.data(cell), protocol=self.protocol, seed=self.seed).accuracy


@register_measure("knn")
@dataclass(frozen=True)
class KNNAccuracy(_Probe):
    """See `knn_probe`."""

    knn_k: int = 20

    def check(self, bench: Bench) -> None:
        """No more neighbours than there are."""
        check_whole("knn_k", self.knn_k, 1, len(bench.splits["train"]))

    def describe(self) -> dict[str, Any]:
        """Every field of the protocol."""
        return {"k": self.knn_k, "protocol": PROTOCOLS["knn"].replace(k=self.knn_k).describe()}

    def score(self, cell: Held) -> float:
        """Share of images told right."""
        return knn_probe(*self.data(cell), k=self.knn_k).accuracy
