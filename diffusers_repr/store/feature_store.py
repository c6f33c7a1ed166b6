"""`FeatureStore`: features of a data set on disk, with the recipe that made them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.hub import push_folder, resolve_folder
from diffusers_repr.store.manifest import MANIFEST, check_manifest, layout_of, read_manifest
from diffusers_repr.store.shards import Column, header_problem, read_shard, shard_problem, to_labels, to_numpy

REMEDY = "Run the same `diffusers-repr extract` command again: it keeps whole shards and writes the others anew."


class FeatureStore:
    """A folder of Parquet shards with a `manifest.json`; made by `extract_to_store` or `diffusers-repr extract`.

    Attributes:
        folder: Where it lies.
        manifest: Recipe, layout and versions, as written.
        layout: Rows, shards and columns.

    `datasets.load_dataset(folder)` reads it too, here or from the Hub.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, check_manifest(manifest)
        self.layout = layout_of(manifest)

    @classmethod
    def open(cls, folder_or_id: str | os.PathLike[str], revision: str | None = None) -> FeatureStore:
        """Open a finished store.

        Args:
            folder_or_id: A local folder, or a data set on the Hub (downloaded whole).
            revision: Of a Hub id.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no feature store.
            ValueError: If the extraction is not finished, a shard is missing, or the manifest is damaged.
        """
        folder = resolve_folder(folder_or_id, revision, repo_type="dataset")
        if not (folder / MANIFEST).is_file():
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"{str(folder_or_id)!r} is no feature store: it has no {MANIFEST} (it holds {inside}). "
                "`diffusers-repr extract MODEL DATASET ... --out DIR` makes one."
            )
        store = cls(folder, read_manifest(folder))
        there = {f"data/{file.name}" for file in (folder / "data").glob("*.parquet")}
        done = sum(store.layout.path(n) in there for n in range(store.layout.shards)) if there else 0
        if done < store.layout.shards or not store.manifest["complete"]:
            raise ValueError(
                f"The feature store {str(folder_or_id)!r} is not finished: {done} of {store.layout.shards} shards, "
                f"{store.layout.path(0)} and so on, are there. {REMEDY}"
            )
        return store

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        columns = ", ".join(f"{c.name} {c.shape}" for c in self.columns)
        return f"FeatureStore({str(self.folder)!r}, {len(self)} rows of {columns})"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Feature columns."""
        return self.layout.columns

    @property
    def recipe(self) -> dict[str, Any]:
        """What was extracted, from which model and data."""
        return self.manifest["recipe"]

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

    def verify(self) -> None:
        """Read every shard and check it against checksums, recipe and row numbers.

        Raises:
            ValueError: For the first shard that is not whole; names the file and the remedy.
        """
        for shard in range(self.layout.shards):
            problem = shard_problem(self.folder, self.layout, shard)
            if problem is not None:
                raise self._broken(shard, problem)

    def load(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`: `row`, `image_hash`, `label` and the feature columns.

        Raises:
            ValueError: If a shard is corrupted.
        """
        self._check_headers()
        files = [str(self.folder / self.layout.path(n)) for n in range(self.layout.shards)]
        try:
            loaded = datasets.load_dataset("parquet", data_files={self.layout.split: files}, split=self.layout.split)
        except (datasets.exceptions.DatasetsError, pa.ArrowException):
            self.verify()
            raise
        return loaded

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
        return (batch for _, batch in self._read(column.name, batch_rows, partial(_features, column)))

    def array(self, layer: str, timestep: float | None = None) -> np.ndarray:
        """All features of a layer, `(rows, *shape)`; see `arrays` for data that does not fit into memory."""
        column = self.column(layer, timestep)
        self._check_headers()
        whole = np.empty((len(self), *column.shape), self.layout.dtype)
        at = 0
        for part in self.arrays(layer, timestep):
            whole[at : at + len(part)] = part
            at += len(part)
        return whole

    def labels(self) -> np.ndarray:
        """Class id of every row, int64.

        Raises:
            ValueError: If the data had no labels, or a shard is corrupted.
        """
        if self.layout.label is None:
            raise ValueError(f"This store has no labels: the data set {self.recipe['data']['name']!r} had none.")
        found = np.concatenate(
            [batch for _, batch in self._read("label", 65536, partial(to_labels, self.label_names))]
        )
        return found.astype(np.int64, copy=False)

    @property
    def label_names(self) -> list[str] | None:
        """Name of each class id, where the data set had them."""
        return getattr(self.layout.label, "names", None)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the store as a data set repository; returns the address of the commit.

        Args:
            repo_id: `"user/name"`.
            private: Whether a repository made here is private.
            token: As in `diffusers_repr.hub.push_folder`.
        """
        return push_folder(
            self.folder, repo_id, kind="store of features", repo_type="dataset", private=private, token=token
        )

    def _read(
        self, name: str, batch_rows: int, convert: Callable[[pa.Array], np.ndarray]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """`(shard, values)` of a column, checked."""
        for shard in range(self.layout.shards):
            self._check_header(shard)
            try:
                for batch in read_shard(self.folder, self.layout, shard, name, batch_rows):
                    yield shard, convert(batch)
            except (pa.ArrowException, OSError, ValueError) as error:
                problem = shard_problem(self.folder, self.layout, shard) or f"cannot be read ({error})"
                raise self._broken(shard, problem) from error

    def _check_headers(self) -> None:
        """Refuse shards of other columns or rows before memory is taken for them."""
        for shard in range(self.layout.shards):
            self._check_header(shard)

    def _check_header(self, shard: int) -> None:
        problem = header_problem(self.folder, self.layout, shard)
        if problem is not None:
            raise self._broken(shard, problem)

    def _broken(self, shard: int, problem: str) -> ValueError:
        return ValueError(f"Shard {str(self.folder / self.layout.path(shard))!r} {problem}. {REMEDY}")


def _features(column: Column, values: pa.Array) -> np.ndarray:
    found = to_numpy(values, column.shape)
    if not np.isfinite(found).all():
        raise ValueError(f"column {column.name!r} holds NaN or infinity, which no extraction writes")
    return found
