"""`FeatureStore`: features of a data set on disk, with the recipe that made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.hub.schema import Check
from diffusers_repr.store.card import store_card
from diffusers_repr.store.feature_layout import SCHEMA, Column, FeatureLayout, to_labels
from diffusers_repr.store.manifest import count_shards
from diffusers_repr.store.parquet import to_numpy
from diffusers_repr.store.parquet_store import ParquetStore
from diffusers_repr.store.shards import with_tuples


class FeatureStore(ParquetStore):
    """A folder of Parquet shards with a `manifest.json`; made by `extract_to_store` or `diffusers-repr extract`.

    Attributes:
        folder: Where it lies.
        manifest: Recipe, layout and versions, as written.
        layout: Rows, shards and columns.

    `datasets.load_dataset(folder)` reads it too, here or from the Hub: `row`, `image_hash`, `label` and the feature
    columns.
    """

    noun: ClassVar[str] = "store of features"
    command: ClassVar[str] = "diffusers-repr extract"
    elsewhere: ClassVar[str] = "another --out"
    schema: ClassVar[Check] = staticmethod(SCHEMA)

    layout: FeatureLayout

    @classmethod
    def layout_of(cls, manifest: Mapping[str, Any]) -> FeatureLayout:
        """See `Store`."""
        label = manifest["label"]
        kind = None
        if label is not None:
            kind = datasets.ClassLabel(names=label["names"]) if label["names"] else datasets.Value("int64")
        return FeatureLayout(
            split=manifest["recipe"]["data"]["split"],
            rows=manifest["rows"],
            shard_size=manifest["shard_size"],
            recipe=manifest["recipe_hash"],
            columns=tuple(Column(**with_tuples(column)) for column in manifest["columns"]),
            dtype=manifest["recipe"]["features"]["dtype"],
            label=kind,
        )

    @classmethod
    def describe(cls, layout: FeatureLayout, recipe: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        """See `Store`."""
        return {
            "recipe_hash": layout.recipe,
            **{name: getattr(layout, name) for name in ("rows", "shard_size", "shards")},
            "label": None if layout.label is None else {"names": getattr(layout.label, "names", None)},
            "columns": [asdict(column) for column in layout.columns],
            "recipe": dict(recipe),
        }

    @classmethod
    def agrees(cls, manifest: dict[str, Any], at: str) -> None:
        """See `Store`."""
        count_shards(manifest, at)
        data, features = manifest["recipe"]["data"], manifest["recipe"]["features"]
        if data["rows"] != manifest["rows"]:
            raise ValueError(f"{at}: rows is {manifest['rows']}, recipe.data.rows is {data['rows']}.")
        if (data["label_column"] is None) != (manifest["label"] is None):
            raise ValueError(f"{at}: label and recipe.data.label_column do not tell the same.")
        names = [column["name"] for column in manifest["columns"]]
        if len({*names, "row", "image_hash", "label"}) != len(names) + 3:
            raise ValueError(f"{at}: columns have a name that stands twice, or is 'row', 'image_hash' or 'label'.")
        for index, column in enumerate(manifest["columns"]):
            if column["layer"] not in features["layers"] or column["level"] >= len(features["levels"]):
                raise ValueError(f"{at}: columns[{index}] is of a layer or level that recipe.features does not name.")

    @classmethod
    def card(cls, manifest: dict[str, Any]) -> str:
        """See `Store`."""
        return store_card(manifest)

    def __repr__(self) -> str:
        columns = ", ".join(f"{c.name} {c.shape}" for c in self.columns)
        return f"FeatureStore({str(self.folder)!r}, {len(self)} rows of {columns})"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Feature columns."""
        return self.layout.columns

    def column(self, layer: str, timestep: float | None = None) -> Column:
        """The column of a layer at a timestep.

        Args:
            layer: Full module path.
            timestep: None where the store holds one level only.

        Raises:
            KeyError: If it is not in the store, or several are and no timestep is given.
        """
        found = [c for c in self.columns if c.layer == layer and timestep in (None, c.timestep)]
        if len(found) != 1:
            asked = f"layer {layer!r}" + ("" if timestep is None else f" at timestep {timestep:g}")
            what = "is not in the store" if not found else "is there at several timesteps; give one"
            raise KeyError(f"{asked} {what}. Columns: {', '.join(c.name for c in self.columns)}.")
        return found[0]

    def arrays(self, layer: str, timestep: float | None = None, batch_rows: int = 1024) -> Iterator[np.ndarray]:
        """The features of a layer in order, `(at most batch_rows, *shape)` at a time.

        Args:
            layer: Full module path.
            timestep: None where the store holds one level only.
            batch_rows: Rows in memory at once.

        Raises:
            KeyError: For a layer or timestep that is not stored.
            ValueError: If a shard is corrupted, or holds NaN or infinity, which no extraction writes; names the file
                and the remedy.

        Returns:
            An iterator of arrays in the stored dtype.
        """
        column = self.column(layer, timestep)
        return self._read(column.name, batch_rows, partial(_features, column))

    def array(self, layer: str, timestep: float | None = None) -> np.ndarray:
        """All features of a layer, `(rows, *shape)`; see `arrays` for data that does not fit into memory."""
        column = self.column(layer, timestep)
        return self._whole(column.shape, self.layout.dtype, self.arrays(layer, timestep))

    def labels(self) -> np.ndarray:
        """Class id of every row, int64.

        Raises:
            ValueError: If the data had no labels, or a shard is corrupted.
        """
        if self.layout.label is None:
            raise ValueError(f"This store has no labels: the data set {self.recipe['data']['name']!r} had none.")
        return self._whole((), "int64", self._read("label", 65536, partial(to_labels, self.label_names)))

    @property
    def label_names(self) -> list[str] | None:
        """Name of each class id, where the data set had them."""
        return getattr(self.layout.label, "names", None)


def _features(column: Column, values: pa.Array) -> np.ndarray:
    found = to_numpy(values, column.shape)
    if not np.isfinite(found).all():
        raise ValueError(f"column {column.name!r} holds NaN or infinity, which no extraction writes")
    return found
