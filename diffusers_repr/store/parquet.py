"""Shards as Parquet files, which `datasets` loads as they are."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusers_repr.store.shards import STAMP, Append, Layout

_MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class ParquetLayout(Layout):
    """Rows in Parquet files; column `row` holds a row's number."""

    suffix: ClassVar[str] = "parquet"

    @abstractmethod
    def features(self) -> datasets.Features:
        """Column types as `datasets` shows them, `row` first."""

    @abstractmethod
    def table_problem(self, table: pa.Table) -> str | None:
        """What the values of some rows have wrong, in a few words; gaps are looked for already."""

    nullable: ClassVar[tuple[str, ...]] = ()

    def schema(self, shard: int) -> pa.Schema:
        """Arrow schema of a shard, stamped with recipe and place."""
        schema = self.features().arrow_schema
        return schema.with_metadata(
            {**(schema.metadata or {}), STAMP.encode(): json.dumps(self.place(shard)).encode()}
        )

    @contextmanager
    def writer(self, file: BinaryIO, shard: int) -> Iterator[Append]:
        """See `Layout`; every `write` becomes a row group."""
        schema = self.schema(shard)
        settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
        with pq.ParquetWriter(file, schema, **settings) as writer:
            yield lambda rows: writer.write_table(table_of(rows, schema))

    def stamp(self, path: Path) -> bytes | None:
        """See `Layout`."""
        return (pq.read_schema(path).metadata or {}).get(STAMP.encode())

    def header_problem(self, path: Path, shard: int) -> str | None:
        """See `Layout`."""
        start, stop = self.span(shard)
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(self.schema(shard)):
                return "has other columns than the manifest tells"
            if file.metadata.num_rows != stop - start:
                return f"has {file.metadata.num_rows} rows instead of {stop - start}"
        return None

    def content_problem(self, path: Path, shard: int) -> str | None:
        """See `Layout`; a row group at a time."""
        start, stop = self.span(shard)
        rows = []
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                rows.append(table["row"].to_numpy())
                if any(table[name].null_count for name in table.column_names if name not in self.nullable):
                    return "has gaps"
                problem = self.table_problem(table)
                if problem is not None:
                    return problem
        if not np.array_equal(np.concatenate(rows), np.arange(start, stop)):
            return f"does not hold rows {start} to {stop - 1}"
        return None


def table_of(rows: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Values `(rows, ...)` by column as a table; columns that the schema has not are left out."""
    arrays = [_to_arrow(rows[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def array_feature(shape: Sequence[int], dtype: str) -> Any:
    """The type of a column of arrays: a list of fixed length, or arrays of two to four dimensions.

    Raises:
        ValueError: For more dimensions.
    """
    if len(shape) == 1:
        return datasets.List(datasets.Value(dtype), length=shape[0])
    arrays = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D}
    if len(shape) not in arrays:
        raise ValueError(f"A feature of shape {tuple(shape)} cannot be stored; use a pooling.")
    return arrays[len(shape)](shape=tuple(shape), dtype=dtype)


def _to_arrow(values: Any, kind: Any) -> pa.Array:
    if not isinstance(values, np.ndarray) or values.ndim < 2:
        return pa.array(values, kind)
    values = np.ascontiguousarray(values)
    flat = pa.array(values.reshape(-1))
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    if values.size > _MAX_OFFSET:
        raise ValueError(f"{values.shape} values at once are too many for Arrow; use a smaller batch_size.")
    for size in reversed(values.shape[1:]):
        flat = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, size, dtype=np.int32)), flat)
    return pa.ExtensionArray.from_storage(kind, flat)


def read_column(folder: Path, layout: ParquetLayout, shard: int, name: str, batch_rows: int) -> Iterator[pa.Array]:
    """A column of a shard as Arrow arrays, `batch_rows` rows at a time.

    Raises:
        pyarrow.ArrowException, OSError: For a file that is broken.
    """
    with pq.ParquetFile(folder / layout.path(shard), page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=[name]):
            yield batch.column(name)


def to_numpy(array: pa.Array, shape: Sequence[int] = ()) -> np.ndarray:
    """A column `(rows, *shape)`."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    rows = len(array)
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(rows, *shape)


def row_bytes(shapes: Sequence[Sequence[int]], dtype: str) -> int:
    """Bytes of one row of arrays."""
    return sum(math.prod(shape) for shape in shapes) * np.dtype(dtype).itemsize
