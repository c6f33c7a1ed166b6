"""PCK as a measure of layers and levels: which features find the points of one image in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.denoiser import Layer
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.metrics.gather import failing_together
from diffusers_repr.metrics.pck import PCKReference, correct_points, pck, reference_length
from diffusers_repr.store.processes import process_state
from diffusers_repr.sweep.grid import SweepGrid
from diffusers_repr.sweep.measure import (
    Bench,
    CellScore,
    Key,
    Measure,
    Piece,
    Split,
    Tally,
    not_finite,
    register_measure,
)

Numbered = list[tuple[int, PairPoints]]  # pairs with their places among all


@register_measure("pck")
@dataclass(frozen=True)
class PCKMeasure(Measure):
    """Percentage of correct key points of annotated pairs, see `diffusers_repr.metrics.pck`; nothing is fitted.

    Of the source images the features of their points are kept, C values a point; the target images stream by, each
    once for all pairs that it is in.

    Attributes:
        alpha: Share of the reference length that a match may be off.
        reference: `box` of the object in the target image, or `image`.
        per: `point` or `image`: what counts alike.
    """

    pooling: str | None = field(default=None, init=False)
    alpha: float = 0.1
    reference: PCKReference = "box"
    per: Literal["point", "image"] = "point"

    paired: ClassVar[bool] = True

    def check(self, bench: Bench) -> None:
        """A reference length for every pair."""
        if self.per not in ("point", "image"):
            raise ValueError(f"per is 'point' or 'image'; got {self.per!r}.")
        for _, pair in _pairs(bench, "held"):
            reference_length(self.reference, (1, 1), pair.box)

    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Features of all points of source images, float32."""
        return 4 * layer.channels * sum(len(pair.source_points) for _, pair in _pairs(bench, "train"))

    def tally(self, grid: SweepGrid, bench: Bench) -> Tally:
        """Points of the sources, then hits in the targets."""
        return _Hits(self, grid, bench)


@dataclass(frozen=True)
class _Side:
    """What pairs there are of each image of a split: its targets."""

    pairs: Sequence[Numbered]
    sizes: Sequence[tuple[int, int]]


class _Images(Sequence[Any]):
    """Images of a side, read when asked for."""

    def __init__(self, pairs: ImagePairs, places: Sequence[int]) -> None:
        self.pairs, self.places = pairs, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        return self.pairs.image(self.places[at])


def open_pairs(pairs: Any, validation: Any) -> dict[str, Split]:
    """Pairs as a sweep reads them: `train` are the source images, `held` the target images, each once.

    Args:
        pairs: `ImagePairs`, or a list as `ImagePairs.from_list` takes it.
        validation: None: nothing is fitted, so that there is one set of pairs.

    Raises:
        ValueError: For a second set.
        TypeError: For anything else than pairs.
    """
    if validation is not None:
        raise ValueError(
            "PCK fits nothing: it is measured on one set of pairs. Pass validation=None, and keep other pairs to "
            "measure the choice on (`Correspondence.evaluate`)."
        )
    held = pairs if isinstance(pairs, ImagePairs) else None
    if held is None:
        if not isinstance(pairs, (list, tuple)):
            raise TypeError(
                f"PCK is measured on ImagePairs, or a list of (source, target, source_points, target_points); got "
                f"{type(pairs).__name__}."
            )
        held = ImagePairs.from_list(pairs)
    splits = {}
    for role, side in (("train", "source"), ("held", "target")):
        own: dict[int, Numbered] = {}
        for at, pair in enumerate(held.pairs):
            own.setdefault(getattr(pair, side), []).append((at, pair))
        images = ImageRows(_Images(held, list(own)), f"{held.name}, {side} images")
        targets = _Side(list(own.values()), [held.size(at) for at in own])
        splits[role] = Split(images, range(len(own)), images.name, targets)
    return splits


class _Hits(Tally):
    def __init__(self, measure: PCKMeasure, grid: SweepGrid, bench: Bench) -> None:
        self.measure, self.grid, self.bench = measure, grid, bench
        self.vectors: dict[tuple[Key, int], Tensor] = {}  # (cell, pair) -> (N, C)
        self.correct: dict[tuple[Key, int], Tensor] = {}  # (cell, pair) -> (N,)

    def add(self, role: str, piece: Piece) -> None:
        """Keep points of source images; match them in target images."""
        side: _Side = self.bench.splits[role].targets
        for path, maps in piece.features[None].items():
            cell = piece.level, path
            for at, feature_map in zip(piece.at.tolist(), maps, strict=True):
                if not bool(torch.isfinite(feature_map).all()):
                    raise not_finite(path, self.grid.levels[piece.level], self.bench.splits[role].name)
                self._image(role, cell, side.pairs[at], feature_map, side.sizes[at])

    def _image(self, role: str, cell: Key, pairs: Numbered, feature_map: Tensor, size: tuple[int, int]) -> None:
        if role == "train":
            for at, pair in pairs:
                self.vectors[cell, at] = sample_map(feature_map, pair.source_points, size).cpu()
            return
        cosine = CosineMap(feature_map, size)
        for at, pair in pairs:
            best = cosine.best(self.vectors[cell, at]).points
            length = reference_length(self.measure.reference, size, pair.box)
            self.correct[cell, at] = correct_points(best, pair.target_points, length, self.measure.alpha)

    def close(self, role: str) -> None:
        """Every process gets the points, and then the hits, of all."""
        if role == "train":
            self.vectors = _of_all(self.vectors)
        else:
            self.correct = _of_all(self.correct)
            self.vectors = {}

    def scores(self) -> dict[Key, dict[str, CellScore]]:
        """PCK of every cell."""
        cells = sorted({cell for cell, _ in self.correct})
        count = 1 + max(at for _, at in self.correct)
        found = {}
        for cell in cells:
            share = pck([self.correct[cell, at] for at in range(count)], self.measure.alpha)
            value = share.per_point if self.measure.per == "point" else share.per_image
            found[cell] = {self.measure.name: CellScore(value)}
        return found


def _of_all(held: dict[tuple[Key, int], Tensor]) -> dict[tuple[Key, int], Tensor]:
    from accelerate.utils import gather_object

    if process_state().num_processes == 1:
        return held
    with failing_together():
        parts = gather_object([held])
    return {key: value for part in parts for key, value in part.items()}


def _pairs(bench: Bench, role: str) -> Numbered:
    return [one for numbered in bench.splits[role].targets.pairs for one in numbered]


__all__ = ["PCKMeasure", "open_pairs"]
