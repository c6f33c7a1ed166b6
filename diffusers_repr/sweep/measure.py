"""What a sweep measures of every cell: the contract, and the registry of names.

A `Measure` is a frozen dataclass of its settings. The simple kind is one function of the pooled features of all
images, which the sweep keeps for it: it overrides `score`. The other kind keeps something smaller than features (sums,
counts) while they stream by, pooled or as maps: it overrides `bytes_of` and `tally`. `sweep/similarity.py` has the
one, `sweep/linear.py` the other.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.denoiser import Layer
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.pooling import pooled_size
from diffusers_repr.hub.registry import Registry
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.grid import SweepGrid

Key = tuple[int, str]  # (index of the level, path of the layer)
M = TypeVar("M", bound="type[Measure]")


@dataclass(frozen=True)
class Split:
    """Images of one role, and what is known of them.

    Attributes:
        images: The data set.
        rows: Which of them.
        name: For messages.
        targets: Class ids or values of these rows, or whatever else a measure compares with; None without.
    """

    images: ImageRows
    rows: Sequence[int]
    name: str
    targets: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def image_size(self, channels: int, resize: int | tuple[int, int] | None) -> tuple[int, int]:
        """(H, W) of the first image, as it is read."""
        pixels = to_pixels(self.images.read(self.rows[:1]), channels, resize)
        return pixels.shape[2], pixels.shape[3]


class CellScore(NamedTuple):
    """What was measured of a cell: None where it is undefined, and `why`; the penalty of the fit that gave it."""

    value: float | None
    penalty: float = 0.0
    why: str | None = None


@dataclass
class Bench:
    """What measures are given besides features.

    Attributes:
        splits: `train`, whose images are compared or fitted on, and where there is one `held`, which scores.
        device: Where to compute; it knows float64.
        encode: From pixels to the features `(n, D)` to compare with; None without an encoder.
        reference: What `encode` made of each split, `(N, D)`; filled in the first pass.
        reference_scores: Of the encoder's own features, by measure.
        shared: Whatever a measure makes once for all cells.
    """

    splits: Mapping[str, Split]
    device: torch.device
    encode: Callable[[Tensor], Tensor] | None = None
    reference: dict[str, Tensor] = field(default_factory=dict)
    reference_scores: dict[str, float] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


class Held(NamedTuple):
    """Features of one cell, `(N, D)` float32 of `train` and `(M, D)` of `held` where it is read."""

    train: Tensor
    held: Tensor | None
    bench: Bench


class Piece(NamedTuple):
    """Features of some images at one level."""

    at: Tensor  # (n,), places of the images in their split
    level: int  # index in the grid of the pass
    part: slice  # which of the batch of images these are
    features: Mapping[str | None, Mapping[str, Tensor]]  # pooling -> path -> features
    draw: int = 0  # which reading of the split, where a measure asks for several


class Tally:
    """What is kept in one pass over the images. Every process is told of its own share of them."""

    def begin(self, role: str, at: Tensor, pixels: Tensor) -> None:
        """A batch of images `(n, C, H, W)` in [-1, 1] comes; `at` are their places in the split."""

    def add(self, role: str, piece: Piece) -> None:
        """Features of some images of the batch, at one level."""

    def end(self, role: str, at: Tensor) -> None:
        """The batch has been added at every level."""

    def close(self, role: str) -> None:
        """All images of a split have been added, on every process; `train` comes first."""

    def scores(self) -> dict[Key, dict[str, CellScore]]:
        """Score of every cell of the pass, by the name of the measure; the same on every process."""
        return {}


@dataclass(frozen=True)
class Measure(ABC):  # noqa: B024 - one of `score` and `tally` is overridden
    """One number of a cell; larger is better. Subclass it and `register_measure` it.

    Attributes:
        name: As in tables and files.
        pooling: Of the features it takes; None takes maps `(n, C, H, W)` float32, for measures with a `tally`.
        roles: Splits that it reads, in order.
        needs_labels: Whether it needs class ids, one an image, as targets of its splits.
        needs_encoder: Whether it compares with an encoder.
        paired: Whether its splits are the two sides of pairs of images, which may share images.
    """

    name: str
    pooling: str | None = "mean"

    roles: ClassVar[tuple[str, ...]] = ("train", "held")
    needs_labels: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    def check(self, bench: Bench) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ValueError, before the first forward, for what cannot be measured."""

    def describe(self) -> dict[str, Any]:
        """What the number depends on, as plain values."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name not in ("name", "pooling")}

    def score(self, cell: Held) -> float:
        """The number of a cell; raises `UndefinedScoreError` where there is none."""
        raise NotImplementedError(f"{type(self).__name__} has neither a score nor a tally of its own.")

    def dim(self, layer: Layer) -> int:
        """Length of the feature of a layer; its channels where it is a map."""
        return layer.channels * (1 if self.pooling is None else pooled_size(self.pooling))

    @property
    def augments(self) -> bool:
        """Whether `view` changes images."""
        return False

    def draws_of(self, role: str) -> int:
        """How often a split is read, each time with other noise."""
        return 1

    def view(self, pixels: Tensor, role: str, at: Tensor, seed: int, draw: int) -> Tensor:
        """The pixels that are read instead of an image's own: of a measure that augments, alone in its sweep.

        Args:
            pixels: `(n, C, H, W)` in [-1, 1].
            role: Of the split.
            at: Places of the images in it.
            seed: Of the noise.
            draw: Which reading of the split it is.
        """
        return pixels

    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Bytes that are kept of one layer at one level: float32 features of every image."""
        return 4 * sum(map(len, bench.splits.values())) * layer.channels * pooled_size(self.pooling)

    def tally(self, grid: SweepGrid, bench: Bench) -> Tally | None:
        """What it keeps of these layers and levels; None: features, which all such measures share."""
        return None


MEASURES = Registry("metric", Measure, "register_measure")


def register_measure(*names: str) -> Callable[[M], M]:
    """Let a class of measures be chosen by name in `select_features` and `measure_alignment`.

    Raises:
        ValueError: For a name that is taken.
    """
    return MEASURES.register(*names)


def make_measure(measure: str | Measure, **settings: Any) -> Measure:
    """A measure of a name, with those of the settings that it has; a measure itself is returned as it is.

    Raises:
        ValueError: For an unknown name.
    """
    if isinstance(measure, Measure):
        return measure
    cls = MEASURES.find(measure)
    own = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(measure, **{name: value for name, value in settings.items() if name in own})


def not_finite(layer: str, level: NoiseLevel, data: Any) -> FloatingPointError:
    """The error for features that are no numbers."""
    return FloatingPointError(
        f"{layer!r} gave NaN or infinite features at timestep {level.timestep:g} on {data}. Load the model in float32 "
        "or bfloat16, or leave this layer out."
    )
