"""How features lie in a store: columns of layers and levels, and the manifest that tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.schema import digest, integer, listing, mapping, number, one_of, optional, record, text
from diffusers_repr.store.manifest import MAX_ROWS, MAX_SHARDS, SIDE, SPLIT, manifest_schema
from diffusers_repr.store.parquet import ParquetLayout, array_feature, to_numpy

_NAME = text(1000)

_COLUMN = record(
    {
        "name": _NAME,
        "layer": _NAME,
        "level": integer(0, 100_000),
        "timestep": number(),
        "shape": listing(SIDE, 1, 4),
    },
    {"grid": optional(listing(SIDE, 2, 2)), "text_tokens": integer(0, 1 << 24)},
)
_DATA = record(
    {
        "name": text(),
        "split": SPLIT,
        "image_column": _NAME,
        "label_column": optional(_NAME),
        "rows": integer(1, MAX_ROWS),
    },
    others=True,
)
_FEATURES = record(
    {
        "layers": listing(_NAME, 1, 100_000),
        "where": _NAME,
        "levels": listing(mapping(number()), 1, 100_000),
        "noise": _NAME,
        "ensemble_size": integer(1, 1_000_000),
        "pooling": optional(_NAME),
        "seed": integer(),
        "image_size": listing(integer(1, MAX_SIDE), 2, 2),
        "prompt": optional(text()),
        "class_label": optional(integer()),
        "dtype": one_of("float32", "float16"),
    },
    others=True,
)
_MODEL = record({"name": optional(text()), "revision": optional(text()), "class": _NAME}, others=True)
SCHEMA = manifest_schema(
    {
        "recipe_hash": digest(),
        "rows": integer(1, MAX_ROWS),
        "shard_size": integer(1, MAX_ROWS),
        "shards": integer(1, MAX_SHARDS),
        "label": optional(record({"names": optional(listing(_NAME, 1, distinct=True))})),
        "columns": listing(_COLUMN, 1, 100_000),
        "recipe": record({"model": _MODEL, "data": _DATA, "features": _FEATURES}),
    }
)


@dataclass(frozen=True)
class Column:
    """One feature column.

    Attributes:
        name: `layer@t<timestep>`.
        layer: Full module path.
        level: Place in the recipe's levels.
        timestep: Of that level.
        shape: Of one image's feature: `(D,)`, tokens `(N, C)` or map `(C, H, W)`.
        grid: (H, W) of tokens, None else.
        text_tokens: Tokens of text that stand before the image's.
    """

    name: str
    layer: str
    level: int
    timestep: float
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    text_tokens: int = 0


@dataclass(frozen=True)
class FeatureLayout(ParquetLayout):
    """Rows of `row`, `image_hash`, `label` where the data have it, and the features.

    Attributes:
        split: Of the data set.
        columns: Feature columns.
        dtype: `float32` or `float16`.
        label: Type of the label column; None without labels.
    """

    nullable: ClassVar[tuple[str, ...]] = ("label",)  # gaps of labels are told by `to_labels`

    split: str
    columns: tuple[Column, ...]
    dtype: str
    label: Any = None

    @property
    def stem(self) -> str:
        """The split."""
        return self.split

    def features(self) -> datasets.Features:
        """See `ParquetLayout`."""
        label = {} if self.label is None else {"label": self.label}
        types = {column.name: array_feature(column.shape, self.dtype) for column in self.columns}
        return datasets.Features(
            {"row": datasets.Value("int64"), "image_hash": datasets.Value("string"), **label, **types}
        )

    def table_problem(self, table: pa.Table) -> str | None:
        """See `ParquetLayout`."""
        for column in self.columns:
            values = (to_numpy(chunk, column.shape) for chunk in table[column.name].chunks)
            if not all(np.isfinite(part).all() for part in values):
                return f"holds NaN or infinity in {column.name!r}, which no extraction writes"
        for chunk in [] if self.label is None else table["label"].chunks:
            to_labels(getattr(self.label, "names", None), chunk)
        return None


def to_labels(names: Sequence[str] | None, array: pa.Array) -> np.ndarray:
    """A label column; -1 is no class.

    Raises:
        ValueError: If it has gaps, or ids outside of the named classes.
    """
    if array.null_count:
        raise ValueError("column 'label' has gaps")
    found = array.to_numpy(zero_copy_only=False)
    if names is not None and len(found) and not -1 <= found.min() <= found.max() < len(names):
        raise ValueError(f"column 'label' holds ids outside the {len(names)} classes")
    return found
