"""`TrainedHeads`: a linear head for every cell by gradient steps, on features that are read once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.denoiser import Layer
from diffusers_repr.denoiser.estimates import check_scheduler
from diffusers_repr.features.pooling import pooled_size
from diffusers_repr.features.views import crop_and_flip
from diffusers_repr.heads.fitting.closed_form import CRITERIA
from diffusers_repr.heads.fitting.protocols import PROTOCOLS, MinibatchProtocol
from diffusers_repr.heads.fitting.stacked import check_stacked, train_linear_heads
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.gather import failing_together, sum_over_processes
from diffusers_repr.store.processes import process_state
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.linear import Scorer, columns_of
from diffusers_repr.sweep.measure import Bench, CellScore, Key, Measure, Piece, Tally, not_finite

METRICS = ("accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class TrainedHeads(Measure):
    """DDAE's grid of linear probes (arXiv 2303.09769): an independent head for every level and layer.

    The source runs the network anew for every epoch. Here each image is read `draws` times, and epochs take turns;
    with as many draws as epochs no noise is seen twice, as there. Its grid scores on test data, this one on `held`.

    Attributes:
        protocol: By `adam` or `sgd`, without BatchNorm.
        draws: Readings of `train`, each with other noise, crops and flips.
        crop: Pixels up to which an image is moved in a reading.
        flip: Whether a reading mirrors half the images.
        seed: Of the first weights and the order of the rows.
    """

    protocol: MinibatchProtocol = PROTOCOLS["ddae"]  # type: ignore[assignment]
    draws: int = 1
    crop: int = 0
    flip: bool = False
    seed: int = 0

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot be trained or scored so."""
        pooled_size(self.pooling)
        check_stacked(self.protocol)
        check_whole("draws", self.draws, 1)
        check_whole("crop", self.crop, 0)
        if self.name not in METRICS:
            raise ValueError(f"metric={self.name!r} with a head of classes; it has {', '.join(METRICS)}.")

    def describe(self) -> dict[str, Any]:
        """Every field, the protocol's own among them."""
        return {**super().describe(), "protocol": self.protocol.describe()}

    @property
    def augments(self) -> bool:
        """Whether images are moved or mirrored."""
        return bool(self.crop or self.flip)

    def draws_of(self, role: str) -> int:
        """`train` several times, `held` once."""
        return self.draws if role == "train" else 1

    def view(self, pixels: Tensor, role: str, at: Tensor, seed: int, draw: int) -> Tensor:
        """Images of `train` moved and mirrored."""
        if role != "train" or not self.augments:
            return pixels
        keys = [f"{seed}:{place}:{draw}" for place in at.tolist()]
        return crop_and_flip(pixels, keys, self.crop, self.flip)

    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Of the float32 features of every reading."""
        rows = sum(self.draws_of(role) * len(split) for role, split in bench.splits.items())
        return 4 * rows * self.dim(layer)

    def tally(self, grid: SweepGrid, bench: Bench) -> Tally:
        """Features of every cell, of a network that was trained for its scheduler."""
        check_scheduler(grid.denoiser)
        return _KeptTally(self, grid, bench)


def trained_heads(
    metric: str, pooling: str | None, criterion: str, draws: int, crop: int, flip: bool
) -> TrainedHeads | None:
    """The measure where `criterion` is a protocol of gradient steps; None where it is a closed form.

    Raises:
        ValueError: For a criterion that is neither, and for draws, crops and flips of a closed form.
    """
    if criterion in PROTOCOLS and criterion not in CRITERIA:
        protocol = PROTOCOLS[criterion]
        if not isinstance(protocol, MinibatchProtocol):
            raise ValueError(f"criterion={criterion!r} is no protocol of gradient steps; {_allowed()}.")
        return TrainedHeads(metric, pooling, protocol, draws, crop, flip)
    if (draws, crop, flip) != (1, 0, False):
        raise ValueError(
            f"draws={draws}, crop={crop}, flip={flip} belong to heads that are trained by gradient steps, such as "
            f"criterion='ddae'; criterion={criterion!r} reads each image once, as it is."
        )
    return None


def _allowed() -> str:
    steps = []
    for name, protocol in PROTOCOLS.items():
        if isinstance(protocol, MinibatchProtocol) and protocol.optimizer != "lars" and protocol.batch_norm is None:
            steps.append(name)
    return f"expected one of {', '.join((*CRITERIA, *steps))}"


class _KeptTally(Tally):
    """Features `(cells, draws, N, D)` of the layers of each length D, on the CPU."""

    def __init__(self, measure: TrainedHeads, grid: SweepGrid, bench: Bench) -> None:
        self.measure, self.grid, self.bench = measure, grid, bench
        lengths: dict[int, list[Key]] = {}
        for at in range(len(grid.levels)):
            for path, layer in grid.layers.items():
                lengths.setdefault(measure.dim(layer), []).append((at, path))
        self.cells = lengths
        self.place = {cell: (size, at) for size, cells in lengths.items() for at, cell in enumerate(cells)}
        self.kept = {
            (role, size): torch.zeros(len(cells), measure.draws_of(role), len(split), size)
            for role, split in bench.splits.items()
            for size, cells in lengths.items()
        }

    def add(self, role: str, piece: Piece) -> None:
        for path, feature in piece.features[self.measure.pooling].items():
            size, at = self.place[piece.level, path]
            self.kept[role, size][at, piece.draw, piece.at] = feature.cpu()

    def close(self, role: str) -> None:
        for size, cells in self.cells.items():
            kept = self.kept[role, size] = sum_over_processes(self.kept[role, size])  # each has its rows, else zeros
            for at, (level, path) in enumerate(cells):
                if not bool(kept[at].isfinite().all()):
                    raise not_finite(path, self.grid.levels[level], self.bench.splits[role].name)

    def scores(self) -> dict[Key, dict[str, CellScore]]:
        """Every process trains a share of the cells."""
        from accelerate.utils import gather_object

        state, found = process_state(), []
        with failing_together():
            for size, cells in self.cells.items():
                mine = list(range(state.process_index, len(cells), state.num_processes))
                if mine:
                    found += list(zip([cells[at] for at in mine], self._trained(size, mine), strict=True))
        named = gather_object(found) if state.num_processes > 1 else found
        return {cell: {self.measure.name: score} for cell, score in named}

    def _trained(self, size: int, mine: list[int]) -> list[CellScore]:
        train, held = (self.bench.splits[role] for role in ("train", "held"))
        classes, device, measure = columns_of(train), self.bench.device, self.measure
        whole = len(mine) == len(self.cells[size])
        features, others = (self.kept[role, size] for role in ("train", "held"))
        if not whole:
            features, others = features[mine], others[mine]
        stack = train_linear_heads(features, train.targets, classes, measure.protocol, measure.seed, device)
        scorers = [Scorer(measure.name, 1, classes) for _ in mine]
        for rows in torch.arange(len(held)).split(1024):
            for scorer, logits in zip(scorers, stack.logits(others[:, 0, rows]).cpu(), strict=True):
                scorer.add(logits[None], held.targets[rows])
        return [CellScore(float(scorer.scores()[0])) for scorer in scorers]


__all__ = ["TrainedHeads", "trained_heads"]
