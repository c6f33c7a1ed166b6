"""One sweep: one forward an image batch and level serves all layers and all measures, on all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Layer
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.pooling import pool
from diffusers_repr.metrics.encoding import SharedRead, read_shared
from diffusers_repr.metrics.gather import own_rows
from diffusers_repr.sweep.grid import SweepGrid, plan_passes
from diffusers_repr.sweep.held import HeldTally
from diffusers_repr.sweep.measure import Bench, CellScore, Key, Measure, Piece, Tally
from diffusers_repr.sweep.progress import SweepBar

_APART = 2**33  # between the seeds of two readings of one split: no seed that is asked for comes near the next


@dataclass
class Sweep:
    """What stays the same for every stage of a sweep.

    Attributes:
        measures: What is measured.
        bench: What measures are given besides features.
        memory: Bytes that may be kept.
        batch_size: Images, or pairs of image and level, a forward.
        condition: `prompt` and `class_labels`, as in `FeatureExtractor`.
        resize: (H, W) to which images are brought; None: they keep their size.
        bar: Counts the forwards.
        forwards: That were made, on this process.
    """

    measures: Sequence[Measure]
    bench: Bench
    memory: float
    batch_size: int
    condition: Mapping[str, Any]
    resize: tuple[int, int] | None
    bar: SweepBar
    forwards: int = 0

    def run(
        self,
        grid: SweepGrid,
        noise: str,
        seeds: Mapping[str, int],
        stage: str,
        on_read: Callable[[str, SharedRead], None],
    ) -> dict[Key, dict[str, CellScore]]:
        """Every measure of every cell, in as few passes over the images as memory allows.

        Args:
            grid: The cells.
            noise: Policy.
            seeds: Of the noise, by split.
            stage: For the progress bar.
            on_read: Called with a split's role and what is known of it, once it has been read for the first time.

        Raises:
            ValueError: If one layer at one level does not fit in memory; for images that do not suit.
            FloatingPointError: For features that are not finite.
        """
        asked = {role for measure in self.measures for role in measure.roles}
        asked |= {"train"} if self.bench.encode is not None else set()
        roles = [role for role in self.bench.splits if role in asked]
        poolings = list(dict.fromkeys(measure.pooling for measure in self.measures))
        passes = self._passes(grid)
        self.expect(stage, roles, sum(len(part.levels) for part in passes))
        scores: dict[Key, dict[str, CellScore]] = {}
        for number, part in enumerate(passes):
            cells = grid.part(part.layers, part.levels)
            tallies = self._tallies(cells)
            for role in roles:
                for draw in range(self.draws_of(role)):
                    found = self.read(cells, role, tallies, poolings, noise, seeds[role], draw)
                for tally in tallies:
                    tally.close(role)
                if not number:
                    on_read(role, found)
            for tally in tallies:
                for (at, path), named in tally.scores().items():
                    scores.setdefault((part.levels[at], path), {}).update(named)
        return scores

    def _tallies(self, grid: SweepGrid) -> list[Tally]:
        own = {measure: measure.tally(grid, self.bench) for measure in self.measures}
        held: dict[str | None, list[Measure]] = {}
        for measure in self.measures:
            if own[measure] is None:
                held.setdefault(measure.pooling, []).append(measure)
        kept = [HeldTally(measures, grid, self.bench) for measures in held.values()]
        return [*kept, *(tally for tally in own.values() if tally is not None)]

    def _bytes_of(self, layer: Layer) -> int:
        """What is kept of a layer; features of one pooling are kept once for all measures without a tally."""
        kept = {m.pooling if type(m).tally is Measure.tally else m: m for m in self.measures}
        return sum(measure.bytes_of(layer, self.bench) for measure in kept.values())

    def expect(self, stage: str, roles: Sequence[str], levels: int) -> None:
        """Announce the forwards that reading these splits at so many levels makes on this process."""
        self.bar.begin(stage, self.forwards_of(roles, levels))

    def forwards_of(self, roles: Sequence[str], levels: int) -> int:
        """Forwards of this process when it reads these splits at so many levels."""
        count = 0
        for role in roles:
            full, rest = divmod(len(own_rows(len(self.bench.splits[role]))), self.batch_size)
            count += self.draws_of(role) * (full * levels + -(-rest * levels // self.batch_size))
        return count

    def draws_of(self, role: str) -> int:
        """How often a split is read, each time with other noise: as often as its measure asks for."""
        return max(measure.draws_of(role) for measure in self.measures)

    def levels_of(self, grid: SweepGrid) -> int:
        """Levels that `run` reads each split at, over all passes that memory asks for."""
        return sum(len(part.levels) for part in self._passes(grid))

    def _passes(self, grid: SweepGrid) -> Any:
        return plan_passes(grid.layers, len(grid.levels), self._bytes_of, self.memory)

    def read(
        self,
        grid: SweepGrid,
        role: str,
        tallies: Sequence[Tally],
        poolings: Sequence[str | None],
        noise: str,
        seed: int,
        draw: int = 0,
    ) -> SharedRead:
        """Let the images of a split stream by: each process reads a share of them and tells its tallies.

        Args:
            grid: Every layer is read at every level.
            role: Of the split.
            tallies: Are told of every batch of images (`begin`, `end`) and of every level of it (`add`).
            poolings: The features that they take: pooled vectors `(n, D)`; of None, maps `(n, C, H, W)`.
            noise: Policy.
            seed: Of the noise.
            draw: Which of the readings of this split it is, from 0; each has noise of its own.

        Raises:
            ValueError: For images that differ in size or do not suit the model, on every process.
        """
        denoiser, split = grid.denoiser, self.bench.splits[role]
        extractor = FeatureExtractor(
            denoiser,
            list(grid.layers),
            list(grid.levels),
            noise,
            batch_size=self.batch_size,
            seed=seed + draw * _APART,
            image_size=self.resize or "keep",
        )
        places = iter(torch.tensor(own_rows(len(split)), dtype=torch.int64).split(self.batch_size))

        def make(pixels: Tensor) -> dict[str, Tensor]:
            at = next(places)
            for tally in tallies:
                tally.begin(role, at, pixels)
            pixels = self.measures[0].view(pixels, role, at, seed, draw)
            for level, part, features in self._stream(extractor, pixels, poolings):
                for tally in tallies:
                    tally.add(role, Piece(at[part], level, part, features, draw))
            for tally in tallies:
                tally.end(role, at)
            return {}

        with torch.no_grad(), denoiser.evaluating():
            return read_shared(
                split.images,
                split.rows,
                make,
                (),
                channels=denoiser.image_channels,
                image_size=self.resize,
                batch_size=self.batch_size,
            )

    def _stream(
        self, extractor: FeatureExtractor, pixels: Tensor, poolings: Sequence[str | None]
    ) -> Iterator[tuple[int, slice, dict[str | None, dict[str, Tensor]]]]:
        denoiser, count = extractor.denoiser, len(pixels)
        for batch in extractor.batches(pixels, **self.condition):
            size, rows = (batch.x_t.shape[2], batch.x_t.shape[3]), len(batch.cells)

            def pooled(
                feature: Tensor, path: str, size: tuple[int, int] = size, rows: int = rows
            ) -> dict[str | None, Tensor]:
                if feature.ndim < 2 or len(feature) != rows:
                    raise ValueError(
                        f"Layer {path!r} gave shape {tuple(feature.shape)} for a batch of {rows}: it holds no feature "
                        "per image."
                    )
                place = denoiser.token_grid(path, feature.shape[1], size) if feature.ndim == 3 else None
                made = {pooling: pool(feature, pooling, place) for pooling in poolings}
                if None in made:  # copied: it may be the layer's own memory, which later layers may write to
                    made[None] = (feature if place is None else FeatureMap(feature, *place).as_map()).float().clone()
                return made

            with extractor.reading(), capture(denoiser.model, extractor.layers, transform=pooled) as tape:
                denoiser.predict(batch.x_t, batch.level, batch.condition)
            self.forwards += 1
            self.bar.update(1)
            for level, part, at in _levels(batch.cells, count):
                made = tape.features.items()
                yield level, part, {p: {path: by_pooling[p][at] for path, by_pooling in made} for p in poolings}


def _levels(cells: Sequence[int], count: int) -> Iterator[tuple[int, slice, slice]]:
    """`(level, images, rows)` for each run of one level among the rows of a forward (`level * count + image`)."""
    start = 0
    while start < len(cells):
        level, first = divmod(cells[start], count)
        length = min(len(cells) - start, count - first)
        yield level, slice(first, first + length), slice(start, start + length)
        start += length
