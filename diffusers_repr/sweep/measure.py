"""What a sweep measures of every cell: the contract, and the registry of names.

A `Measure` is a frozen dataclass of its settings. It makes a `Tally` for every pass over the images, which is told of
features as they stream by, keeps what it needs (sums, counts, the features themselves) and gives a `Score` for every
cell in the end. Measures that want vectors `(n, D)` name a pooling, dense ones (correspondence, segmentation) take maps
`(n, C, H, W)`. Where keeping pooled features is cheap, `HeldMeasure` asks for one function only.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.denoiser import Layer
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.grid import Grid

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


@dataclass(frozen=True)
class Score:
    """What was measured of a cell.

    Attributes:
        value: The number, larger being better; None where it is undefined.
        penalty: Of the fit that gave it; 0 where nothing is fitted.
        why: Why it is undefined.
    """

    value: float | None
    penalty: float = 0.0
    why: str | None = None


@dataclass(frozen=True)
class Piece:
    """Features of some images at one level.

    Attributes:
        at: `(n,)`, places of the images in their split.
        level: Index of the level in the grid of the pass.
        part: Which of the batch of images these are.
        features: Pooling -> path -> features.
    """

    at: Tensor
    level: int
    part: slice
    features: Mapping[str | None, Mapping[str, Tensor]]


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


class Tally:
    """What a measure keeps of one pass. Every process is told of its own share of the images."""

    def begin(self, role: str, at: Tensor, pixels: Tensor) -> None:
        """A batch of images `(n, C, H, W)` in [-1, 1] comes; `at` are their places in the split."""

    def add(self, role: str, piece: Piece) -> None:
        """Features of some images of the batch, at one level."""

    def end(self, role: str, at: Tensor) -> None:
        """The batch has been added at every level."""

    def close(self, role: str) -> None:
        """All images of a split have been added, on every process; `train` comes first."""

    def scores(self) -> dict[Key, dict[str, Score]]:
        """Score of every cell of the pass, by the name of the measure; the same on every process."""
        return {}


@dataclass(frozen=True)
class Measure(ABC):
    """One number of a cell; larger is better. Subclass it, or `HeldMeasure`, and `register_measure` it.

    Attributes:
        name: As in tables and files.
        pooling: Of the features it takes; None takes maps `(n, C, H, W)` float32.
        roles: Splits that it reads, in order.
        needs_encoder: Whether it compares with an encoder.
    """

    name: str
    pooling: str | None = "mean"

    roles: ClassVar[tuple[str, ...]] = ("train", "held")
    needs_encoder: ClassVar[bool] = False

    @property
    def needs_labels(self) -> bool:
        """Whether it needs class ids, one an image, as targets of its splits."""
        return False

    def check(self, bench: Bench) -> None:
        """Raise ValueError, before the first forward, for what cannot be measured."""

    def describe(self) -> dict[str, Any]:
        """What the number depends on, as plain values."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name not in ("name", "pooling")}

    @abstractmethod
    def bytes_of(self, layer: Layer, bench: Bench) -> int:
        """Bytes that a tally keeps of one layer at one level."""

    @abstractmethod
    def tally(self, grid: Grid, bench: Bench) -> Tally:
        """A tally of these layers and levels."""


MEASURES: dict[str, type[Measure]] = {}


def register_measure(*names: str) -> Callable[[M], M]:
    """Let a class of measures be chosen by name in `select_features` and `measure_alignment`.

    Raises:
        ValueError: For a name that is taken.
    """

    def add(cls: M) -> M:
        for name in names:
            if name in MEASURES:
                raise ValueError(f"A measure {name!r} is registered already: {MEASURES[name].__name__}.")
            MEASURES[name] = cls
        return cls

    return add


def make_measure(measure: str | Measure, **settings: Any) -> Measure:
    """A measure of a name, with those of the settings that it has; a measure itself is returned as it is.

    Raises:
        ValueError: For an unknown name.
    """
    if isinstance(measure, Measure):
        return measure
    if measure not in MEASURES:
        raise ValueError(f"Unknown metric {measure!r}; expected one of {', '.join(MEASURES)}.")
    cls = MEASURES[measure]
    own = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(measure, **{name: value for name, value in settings.items() if name in own})


def not_finite(layer: str, level: NoiseLevel, data: Any) -> FloatingPointError:
    """The error for features that are no numbers."""
    return FloatingPointError(
        f"{layer!r} gave NaN or infinite features at timestep {level.timestep:g} on {data}. Load the model in float32 "
        "or bfloat16, or leave this layer out."
    )
