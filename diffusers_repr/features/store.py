"""`FeatureStore`: features of a data set on disk, with the recipe that made them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.features.shards import Column, Layout, read_shard, shard_problem, to_numpy
from diffusers_repr.hub import push_folder, read_json, resolve_folder

MANIFEST = "manifest.json"
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
        self.folder, self.manifest, self.layout = folder, manifest, layout_of(manifest)

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
        store = cls(folder, read_json(folder / MANIFEST))
        missing = [n for n in range(store.layout.shards) if not (folder / store.layout.path(n)).is_file()]
        if missing or not store.manifest["complete"]:
            done = store.layout.shards - len(missing)
            raise ValueError(
                f"The feature store {str(folder_or_id)!r} is not finished: {done} of {store.layout.shards} shards are "
                f"there. {REMEDY}"
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
                raise ValueError(f"Shard {str(self.folder / self.layout.path(shard))!r} {problem}. {REMEDY}")

    def load(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`: `row`, `image_hash`, `label` and the feature columns.

        Raises:
            ValueError: If a shard is corrupted.
        """
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
            ValueError: If a shard is corrupted; names the file and the remedy.

        Returns:
            An iterator of arrays in the stored dtype.
        """
        column = self.column(layer, timestep)
        return (to_numpy(batch[column.name], column.shape) for batch in self._read([column.name], batch_rows))

    def array(self, layer: str, timestep: float | None = None) -> np.ndarray:
        """All features of a layer, `(rows, *shape)`; see `arrays` for data that does not fit into memory."""
        column = self.column(layer, timestep)
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
        return np.concatenate([batch["label"].to_numpy() for batch in self._read(["label"], 65536)])

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

    def _read(self, names: list[str], batch_rows: int) -> Iterator[dict[str, Any]]:
        for shard in range(self.layout.shards):
            try:
                yield from read_shard(self.folder / self.layout.path(shard), names, batch_rows)
            except (pa.ArrowException, OSError) as error:
                problem = shard_problem(self.folder, self.layout, shard) or f"cannot be read ({error})"
                raise ValueError(
                    f"Shard {str(self.folder / self.layout.path(shard))!r} {problem}. {REMEDY}"
                ) from error


def layout_of(manifest: dict[str, Any]) -> Layout:
    """The layout that a manifest tells.

    Raises:
        ValueError: If the manifest lacks a part.
    """
    try:
        label = manifest["label"]
        kind = None
        if label is not None:
            kind = datasets.ClassLabel(names=label["names"]) if label["names"] else datasets.Value("int64")
        return Layout(
            split=manifest["recipe"]["data"]["split"],
            rows=manifest["rows"],
            shard_size=manifest["shard_size"],
            columns=tuple(Column.from_dict(c) for c in manifest["columns"]),
            dtype=manifest["recipe"]["features"]["dtype"],
            recipe=manifest["recipe_hash"],
            label=kind,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The {MANIFEST} is damaged or of another version ({error!r} is missing). Delete it and run the same "
            "`diffusers-repr extract` command again: shards of this recipe are kept."
        ) from error
