"""`MetricRecord`: a number with all that it depends on; unlike ones refuse to be compared."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_repr.hub import read_json, write_json
from diffusers_repr.hub.schema import anything, integer, mapping, number, one_of, optional, shown, text
from diffusers_repr.hub.schema import record as fields_of
from diffusers_repr.store.manifest import recipe_differences

FORMAT = "diffusers_repr.metric/1"
_TEXT = optional(text())
_PLAIN = mapping(anything())
_SCHEMA = fields_of(
    {"format": one_of(FORMAT), "metric": text(1000, pattern=".+", what="a name"), "value": number()},
    {
        "encoder": optional(_PLAIN),
        "features": _TEXT,
        "counts": mapping(integer(0, 10**15)),
        "reference": _TEXT,
        "resize": _TEXT,
        "weights": _TEXT,
        "backend": mapping(text()),
        "k": optional(integer(1, 10**9)),
        "seed": optional(integer()),
        "settings": _PLAIN,
        "subject": _TEXT,
        "note": _TEXT,
    },
)


class UnlikeRecordsError(ValueError):
    """Two records are not measurements of one thing.

    Attributes:
        fields: Names of the fields that differ.
    """

    def __init__(self, message: str, fields: tuple[str, ...]) -> None:
        super().__init__(message)
        self.fields = fields


@dataclass(frozen=True)
class MetricRecord:
    """One number and how it was measured. Every field but `value`, `subject` and `note` must be equal to compare.

    Attributes:
        metric: Name, e.g. `frechet_distance`.
        value: The number, finite.
        encoder: What the features are: `Encoder.fingerprint()`, or a description of your own.
        features: Which of them: `global` or `tokens` (their mean).
        counts: Samples by set, e.g. `{"real": 50000, "generated": 50000}`.
        reference: What was measured against: a hash of it, or a name.
        resize: How images were brought to the encoder's size.
        weights: Hash of the encoder's weights.
        backend: Package that computed the number: `name` and `version`.
        k: Neighbours, where the metric has them.
        seed: Of every draw, where there are some.
        settings: Whatever else it depends on: protocol, order, clamping, ...
        subject: What was measured: a model, a step. May differ.
        note: Free text. May differ.

    Raises:
        ValueError: For a value that is not finite, or a metric without a name.

    Example:
        >>> a = MetricRecord("frechet_distance", 9.0, {"name": "dinov2"}, counts={"real": 100, "generated": 100})
        >>> b = dataclasses.replace(a, value=7.5)
        >>> a - b
        1.5
        >>> a - dataclasses.replace(b, counts={"real": 100, "generated": 50})
        Traceback (most recent call last):
        ...
        diffusers_repr.metrics.record.UnlikeRecordsError: frechet_distance: ... differ in counts: counts.generated: ...
    """

    metric: str
    value: float
    encoder: Mapping[str, Any] | None = None
    features: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    reference: str | None = None
    resize: str | None = None
    weights: str | None = None
    backend: Mapping[str, str] = field(default_factory=dict)
    k: int | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    subject: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no measurement."""
        if not self.metric or not isinstance(self.metric, str):
            raise ValueError(f"metric must be a name; got {self.metric!r}.")
        if isinstance(self.value, bool) or not math.isfinite(self.value):
            raise ValueError(f"The value of {self.metric} must be a finite number; got {self.value!r}.")

    def __float__(self) -> float:
        return self.value

    def __sub__(self, other: MetricRecord) -> float:
        """`compare(self, other)`."""
        if not isinstance(other, MetricRecord):
            return NotImplemented
        return compare(self, other)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a JSON file; the folder is made if missing."""
        return write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, data: Any, at: str = "a metric record") -> MetricRecord:
        """A record from what `to_dict` gave.

        Args:
            data: As `to_dict` gave it, or JSON gave it back.
            at: Its place, for messages.

        Raises:
            ValueError: If it is no record of this format, or a field says what cannot be; names it.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"{at} is no metric record of format {FORMAT!r}: it says {shown(_format_of(data))}.")
        _SCHEMA(anything(finite=True)(data, at), at)
        return cls(**{name: value for name, value in data.items() if name != "format"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MetricRecord:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: If it is not there, or no record.
        """
        return cls.from_dict(read_json(path), str(path))


_FREE = ("value", "subject", "note")
COMPARED = tuple(f.name for f in dataclasses.fields(MetricRecord) if f.name not in _FREE)


def compare(a: MetricRecord, b: MetricRecord, *, ignore: Iterable[str] = ()) -> float:
    """`a.value - b.value`, if both were measured alike.

    Args:
        a: A record.
        b: Another.
        ignore: Fields that may differ all the same, e.g. `("seed",)` for the spread over seeds.

    Raises:
        UnlikeRecordsError: A ValueError that names every field that differs, with both values.
        ValueError: For an `ignore` that is no field.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    for name in ignore:
        if name not in COMPARED:
            raise ValueError(f"ignore={name!r} is no field that is compared; those are {', '.join(COMPARED)}.")
    left, right = (_plain(record) for record in (a, b))
    unlike, lines = [], []
    for name in COMPARED:
        found = recipe_differences(left[name], right[name], name) if name not in ignore else []
        if found:
            unlike.append(name)
            lines += found
    if unlike:
        raise UnlikeRecordsError(
            f"{a.metric}: {a.value:g} and {b.value:g} cannot be compared, for they differ in {', '.join(unlike)}: "
            f"{'; '.join(lines)}. Measure both alike; `compare(a, b, ignore=...)` if a difference does not matter.",
            tuple(unlike),
        )
    return a.value - b.value


def _plain(record: MetricRecord) -> dict[str, Any]:
    """The fields as JSON gives them back: lists for tuples, so that a loaded record equals the one that was saved."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _format_of(data: Any) -> Any:
    return data.get("format") if isinstance(data, Mapping) else type(data).__name__
