"""`ParquetStore`: a store that `datasets` loads, here or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Self

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.hub import push_folder, resolve_folder
from diffusers_repr.store.parquet import ParquetLayout, read_column
from diffusers_repr.store.shards import shard_problem
from diffusers_repr.store.store import Store


class ParquetStore(Store):
    """A store of Parquet shards; `datasets.load_dataset(folder)` reads it too, here or from the Hub."""

    layout: ParquetLayout

    @classmethod
    def open(cls, folder_or_id: str | os.PathLike[str], revision: str | None = None) -> Self:
        """Open a finished store.

        Args:
            folder_or_id: A local folder, or a data set on the Hub (downloaded whole).
            revision: Of a Hub id.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no store of this kind.
            ValueError: If it is not finished, a shard is missing, or the manifest is damaged.
        """
        return cls.open_folder(resolve_folder(folder_or_id, revision, repo_type="dataset"))

    def load(self) -> datasets.Dataset:
        """The store as a `datasets.Dataset`, its columns as they are.

        Raises:
            ValueError: If a shard is corrupted.
        """
        self._check_shards()
        split = self.layout.stem
        files = [str(self.folder / self.layout.path(n)) for n in range(self.layout.shards)]
        try:
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        except (datasets.exceptions.DatasetsError, pa.ArrowException):
            self.verify()
            raise

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the store as a data set repository; returns the address of the commit.

        Args:
            repo_id: `"user/name"`.
            private: Whether a repository made here is private.
            token: As in `diffusers_repr.hub.push_folder`.
        """
        return push_folder(self.folder, repo_id, kind=self.noun, repo_type="dataset", private=private, token=token)

    def _read(self, name: str, batch_rows: int, convert: Callable[[pa.Array], np.ndarray]) -> Iterator[np.ndarray]:
        """The values of a column in order, checked, at most `batch_rows` rows at a time."""
        for shard in range(self.layout.shards):
            self._check_shard(shard)
            try:
                for batch in read_column(self.folder, self.layout, shard, name, batch_rows):
                    yield convert(batch)
            except (pa.ArrowException, OSError, ValueError) as error:
                problem = shard_problem(self.folder, self.layout, shard) or f"cannot be read ({error})"
                raise self._broken(shard, problem) from error

    def _whole(self, shape: tuple[int, ...], dtype: str, parts: Iterator[np.ndarray]) -> np.ndarray:
        """All values of a column, `(rows, *shape)`; memory is taken once the shards are seen to have them."""
        self._check_shards()
        whole = np.empty((len(self), *shape), dtype)
        at = 0
        for part in parts:
            whole[at : at + len(part)] = part
            at += len(part)
        return whole
