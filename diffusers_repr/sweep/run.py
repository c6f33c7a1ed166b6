"""One sweep: measures of every cell of a grid, as few passes over the images as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffusers_repr.denoiser import Layer
from diffusers_repr.metrics.encoding import SharedRead
from diffusers_repr.sweep.grid import Grid, plan_passes
from diffusers_repr.sweep.held import HeldMeasure, HeldTally
from diffusers_repr.sweep.measure import Bench, Key, Measure, Score, Tally
from diffusers_repr.sweep.reader import Reader


@dataclass(frozen=True)
class Sweep:
    """What stays the same for every stage of a sweep.

    Attributes:
        measures: What is measured; their features come from the same forwards.
        bench: What measures are given besides features.
        reader: Makes features.
        memory: Bytes that may be kept.
    """

    measures: Sequence[Measure]
    bench: Bench
    reader: Reader
    memory: float

    def roles(self) -> list[str]:
        """Splits that any of the measures reads."""
        return [role for role in self.bench.splits if any(role in measure.roles for measure in self.measures)]

    def run(
        self,
        grid: Grid,
        noise: str,
        seeds: Mapping[str, int],
        stage: str,
        read: Callable[[str, SharedRead], None] = lambda role, read: None,
    ) -> dict[Key, dict[str, Score]]:
        """Every measure of every cell.

        Args:
            grid: The cells.
            noise: Policy.
            seeds: Of the noise, by split.
            stage: For the progress bar.
            read: Called with what is known of a split after it has been read, for the first time alone.

        Raises:
            ValueError: If one layer at one level does not fit in memory; for images that do not suit.
            FloatingPointError: For features that are not finite.
        """
        splits, roles = self.bench.splits, self.roles()
        passes = plan_passes(grid.layers, len(grid.levels), self._bytes_of, self.memory)
        forwards = [self.reader.forwards(splits[role], len(part.levels)) for part in passes for role in roles]
        self.reader.progress.expect(stage, sum(forwards))
        scores: dict[Key, dict[str, Score]] = {}
        for number, part in enumerate(passes):
            cells = grid.part(part.layers, part.levels)
            tallies = self._tallies(cells)
            poolings = list(dict.fromkeys(measure.pooling for measure in self.measures))
            for role in roles:
                found = self.reader.read(cells, role, splits[role], tallies, poolings, noise, seeds[role])
                for tally in tallies:
                    tally.close(role)
                if not number:
                    read(role, found)
            for tally in tallies:
                for (at, path), named in tally.scores().items():
                    scores.setdefault((part.levels[at], path), {}).update(named)
        return scores

    def _held(self) -> dict[str | None, list[HeldMeasure]]:
        """Measures that keep features, by the pooling of what they keep: it is kept once for all of them."""
        held: dict[str | None, list[HeldMeasure]] = {}
        for measure in self.measures:
            if isinstance(measure, HeldMeasure):
                held.setdefault(measure.pooling, []).append(measure)
        return held

    def _tallies(self, grid: Grid) -> list[Tally]:
        held = [HeldTally(together, grid, self.bench) for together in self._held().values()]
        return [*held, *(m.tally(grid, self.bench) for m in self.measures if not isinstance(m, HeldMeasure))]

    def _bytes_of(self, layer: Layer) -> int:
        held = [together[0] for together in self._held().values()]
        streaming = [measure for measure in self.measures if not isinstance(measure, HeldMeasure)]
        return sum(measure.bytes_of(layer, self.bench) for measure in (*held, *streaming))
