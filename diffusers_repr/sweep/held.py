"""Measures of features that are kept: the rows of all processes put together, then one function a cell."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.denoiser import Layer
from diffusers_repr.features.extraction import process_state
from diffusers_repr.features.pooling import pooled_size
from diffusers_repr.metrics.checks import UndefinedScoreError
from diffusers_repr.metrics.gather import failing_together, gather_rows, own_rows
from diffusers_repr.sweep.grid import Grid
from diffusers_repr.sweep.measure import Bench, Key, Measure, Piece, Score, Tally, not_finite


@dataclass(frozen=True)
class Held:
    """Features of one cell, by split.

    Attributes:
        train: `(N, D)` float32, on the bench's device.
        held: `(M, D)`; None where no split scores.
        bench: Targets, the encoder's features, and what was made once for all cells.
    """

    train: Tensor
    held: Tensor | None
    bench: Bench


@dataclass(frozen=True)
class HeldMeasure(Measure):
    """A function of the pooled features of all images; all such measures of a sweep share what is kept.

    A measure of one's own is this class with `score` and a name; see `sweep/similarity.py`.
    """

    @abstractmethod
    def score(self, cell: Held) -> float:
        """The number of a cell.

        Raises:
            UndefinedScoreError: Where there is none.
        """

    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Float32 features of every image."""
        return 4 * sum(map(len, bench.splits.values())) * layer.channels * pooled_size(self.pooling)

    def tally(self, grid: Grid, bench: Bench) -> Tally:
        """Of this measure alone."""
        return HeldTally([self], grid, bench)


class HeldTally(Tally):
    """Keeps features on the CPU, and scores cells with every measure; the processes share the scoring.

    Args:
        measures: Of one pooling.
        grid: Layers and levels of the pass.
        bench: What they are given besides.
    """

    def __init__(self, measures: Sequence[HeldMeasure], grid: Grid, bench: Bench) -> None:
        self.measures, self.grid, self.bench = measures, grid, bench
        self.parts: dict[tuple[str, str, int], list[Tensor]] = {}  # (split, layer, level)
        self.encoded: list[Tensor] = []
        self.kept: dict[tuple[str, str, int], Tensor] = {}

    def begin(self, role: str, at: Tensor, pixels: Tensor) -> None:
        """Encode the images, the first time they come by."""
        if self.bench.encode is not None and role not in self.bench.reference:
            self.encoded.append(self.bench.encode(pixels).cpu())

    def add(self, role: str, piece: Piece) -> None:
        """Keep the features; the images of a level come in order."""
        for path, feature in piece.features[self.measures[0].pooling].items():
            self.parts.setdefault((role, path, piece.level), []).append(feature.cpu())

    def close(self, role: str) -> None:
        """Put the rows of all processes together."""
        split = self.bench.splits[role]
        places = torch.tensor(own_rows(len(split)), dtype=torch.int64)

        def whole(parts: list[Tensor]) -> Tensor:
            return gather_rows(torch.cat(parts) if parts else torch.zeros(0), places, len(split))

        for path in self.grid.layers:
            for at, level in enumerate(self.grid.levels):
                features = whole(self.parts.pop((role, path, at), []))
                if not bool(torch.isfinite(features).all()):
                    raise not_finite(path, level, split.name)
                self.kept[role, path, at] = features
        if self.bench.encode is not None and role not in self.bench.reference:
            self.bench.reference[role] = whole(self.encoded)
            self.encoded = []

    def scores(self) -> dict[Key, dict[str, Score]]:
        """Every process scores a share of the cells."""
        from accelerate.utils import gather_object

        self._score_the_encoder()
        state = process_state()
        cells = [(at, path) for path in self.grid.layers for at in range(len(self.grid.levels))]
        found = []
        with failing_together():
            for at, path in cells[state.process_index :: state.num_processes]:
                cell = self._cell(*(self.kept.get((role, path, at)) for role in ("train", "held")))
                found.append(((at, path), {measure.name: _score(measure, cell) for measure in self.measures}))
        return dict(gather_object(found) if state.num_processes > 1 else found)

    def _cell(self, train: Tensor | None, held: Tensor | None) -> Held:
        assert train is not None
        device = self.bench.device
        return Held(train.to(device), None if held is None else held.to(device), self.bench)

    def _score_the_encoder(self) -> None:
        """By the measures that do not compare with it: what a perfect copy of it would score."""
        reference = self.bench.reference
        for measure in self.measures:
            if reference and not measure.needs_encoder and measure.name not in self.bench.reference_scores:
                own = Held(reference["train"], reference.get("held"), self.bench)
                self.bench.reference_scores[measure.name] = measure.score(own)


def _score(measure: HeldMeasure, cell: Held) -> Score:
    try:
        return Score(measure.score(cell))
    except UndefinedScoreError as error:
        return Score(None, why=str(error))
