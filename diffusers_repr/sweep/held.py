"""Features that are kept for measures that are one function of them: the rows of all processes put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_repr.metrics.checks import UndefinedScoreError
from diffusers_repr.metrics.gather import failing_together, gather_rows, own_rows
from diffusers_repr.store.processes import process_state
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.measure import Bench, CellScore, Held, Key, Measure, Piece, Tally, not_finite


class HeldTally(Tally):
    """Keeps features on the CPU, and scores cells with every measure; the processes share the scoring.

    Args:
        measures: Of one pooling.
        grid: Layers and levels of the pass.
        bench: What they are given besides.
    """

    def __init__(self, measures: Sequence[Measure], grid: SweepGrid, bench: Bench) -> None:
        self.measures, self.grid, self.bench = measures, grid, bench
        self.kept: dict[tuple[str, str, int], list[Tensor]] = {}  # (split, layer, level) -> batches, in the end one
        self.encoded: list[Tensor] = []

    def begin(self, role: str, at: Tensor, pixels: Tensor) -> None:
        """Encode the images, the first time they come by."""
        if self.bench.encode is not None and role not in self.bench.reference:
            self.encoded.append(self.bench.encode(pixels).cpu())

    def add(self, role: str, piece: Piece) -> None:
        """Keep the features; the images of a level come in order."""
        for path, feature in piece.features[self.measures[0].pooling].items():
            self.kept.setdefault((role, path, piece.level), []).append(feature.cpu())

    def close(self, role: str) -> None:
        """Put the rows of all processes together."""
        split = self.bench.splits[role]
        places = torch.tensor(own_rows(len(split)), dtype=torch.int64)

        def whole(parts: list[Tensor]) -> Tensor:
            return gather_rows(torch.cat(parts) if parts else torch.zeros(0), places, len(split))

        for path in self.grid.layers:
            for at, level in enumerate(self.grid.levels):
                self.kept[role, path, at] = [whole(self.kept.get((role, path, at), []))]
                if not bool(torch.isfinite(self.kept[role, path, at][0]).all()):
                    raise not_finite(path, level, split.name)
        if self.bench.encode is not None and role not in self.bench.reference:
            self.bench.reference[role] = whole(self.encoded)
            self.encoded = []

    def scores(self) -> dict[Key, dict[str, CellScore]]:
        """Every process scores a share of the cells."""
        from accelerate.utils import gather_object

        state, reference = process_state(), self.bench.reference
        for measure in self.measures:
            if reference and not measure.needs_encoder and measure.name not in self.bench.reference_scores:
                own = Held(reference["train"], reference.get("held"), self.bench)
                self.bench.reference_scores[measure.name] = measure.score(own)
        cells = [(at, path) for path in self.grid.layers for at in range(len(self.grid.levels))]
        found = []
        with failing_together():
            for at, path in cells[state.process_index :: state.num_processes]:
                found_of = {
                    role: self.kept[role, path, at][0].to(self.bench.device)
                    for role in self.bench.splits
                    if (role, path, at) in self.kept
                }
                cell = Held(found_of["train"], found_of.get("held"), self.bench)
                found.append(((at, path), {measure.name: _score(measure, cell) for measure in self.measures}))
        return dict(gather_object(found) if state.num_processes > 1 else found)


def _score(measure: Measure, cell: Held) -> CellScore:
    try:
        return CellScore(measure.score(cell))
    except UndefinedScoreError as error:
        return CellScore(None, why=str(error))
