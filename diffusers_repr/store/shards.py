"""Shards of a feature store: Parquet files that are whole or not there, each with its recipe's name inside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusers_repr.hub import atomic_file
from diffusers_repr.hub.schema import inside, integer, record, text

_STAMP = b"diffusers_repr"
_MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Column:
    """One feature column.

    Attributes:
        name: `layer@t<timestep>`.
        layer: Full module path.
        level: Place in the recipe's levels.
        timestep: Of that level.
        shape: Of one image's feature: `(D,)`, tokens `(N, C)` or map `(C, H, W)`.
        grid: (H, W) of tokens, of a video (frames, H, W), None else.
        text_tokens: Tokens of text that stand before the image's.
    """

    name: str
    layer: str
    level: int
    timestep: float
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    text_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Column:
        """The inverse of `to_dict`, lists for tuples allowed."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Layout:
    """How rows and columns lie in files.

    Attributes:
        split: Name of the split.
        rows: Rows in all.
        shard_size: Rows of every shard but the last.
        columns: Feature columns.
        dtype: `float32` or `float16`.
        recipe: Name of the recipe, from `recipe_hash`.
        label: Type of the label column; None without labels.
    """

    split: str
    rows: int
    shard_size: int
    columns: tuple[Column, ...]
    dtype: str
    recipe: str
    label: Any = None

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_size)

    def path(self, shard: int) -> str:
        """File of a shard inside the store."""
        return f"data/{self.split}-{shard:05d}-of-{self.shards:05d}.parquet"

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows)

    def features(self) -> datasets.Features:
        """Column types as `datasets` shows them."""
        label = {} if self.label is None else {"label": self.label}
        types = {column.name: _feature(column.shape, self.dtype) for column in self.columns}
        return datasets.Features(
            {"row": datasets.Value("int64"), "image_hash": datasets.Value("string"), **label, **types}
        )

    def schema(self, shard: int) -> pa.Schema:
        """Arrow schema of a shard, stamped with recipe and place."""
        schema = self.features().arrow_schema
        stamp = json.dumps({"recipe": self.recipe, "shard": shard, "start": self.span(shard)[0]})
        return schema.with_metadata({**(schema.metadata or {}), _STAMP: stamp.encode()})


def _feature(shape: tuple[int, ...], dtype: str) -> Any:
    if len(shape) == 1:
        return datasets.List(datasets.Value(dtype), length=shape[0])
    arrays = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D}
    if len(shape) not in arrays:
        raise ValueError(f"A feature of shape {shape} cannot be stored; use a pooling.")
    return arrays[len(shape)](shape=shape, dtype=dtype)


# Writing


class ShardWriter:
    """Appends rows to one shard that is being written."""

    def __init__(self, writer: pq.ParquetWriter, layout: Layout, schema: pa.Schema) -> None:
        self._writer, self._layout, self._schema = writer, layout, schema

    def write(
        self, start: int, hashes: Sequence[str], labels: Sequence[int] | None, features: Mapping[str, np.ndarray]
    ) -> None:
        """Append rows `start...`; `features` by column name, `(rows, *shape)`."""
        arrays = [pa.array(np.arange(start, start + len(hashes))), pa.array(hashes, pa.string())]
        if self._layout.label is not None:
            arrays.append(pa.array(labels, self._schema.field("label").type))
        arrays += [_to_arrow(features[c.name], self._schema.field(c.name).type) for c in self._layout.columns]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))


@contextmanager
def write_shard(folder: Path, layout: Layout, shard: int) -> Iterator[ShardWriter]:
    """Fill a shard; it takes its name, flushed to disk, when the block ends well.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an existing shard is untouched then.
    """
    schema = layout.schema(shard)
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with atomic_file(folder / layout.path(shard)) as file, pq.ParquetWriter(file, schema, **settings) as writer:
        yield ShardWriter(writer, layout, schema)


def _to_arrow(values: np.ndarray, kind: Any) -> pa.Array:
    values = np.ascontiguousarray(values)
    flat = pa.array(values.reshape(-1))
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    if values.size > _MAX_OFFSET:
        raise ValueError(f"{values.shape} values at once are too many for Arrow; use a smaller batch_size.")
    for size in reversed(values.shape[1:]):
        flat = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, size, dtype=np.int32)), flat)
    return pa.ExtensionArray.from_storage(kind, flat)


# Reading


_STAMPED = record({"recipe": text(200), "shard": integer(0), "start": integer(0)})


def shard_stamp(path: Path) -> dict[str, Any] | None:
    """What a Parquet file says of its recipe and place; None for a file that says nothing, or is broken."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return _STAMPED(json.loads(metadata[_STAMP]), "stamp")
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError):
        return None


def header_problem(folder: Path, layout: Layout, shard: int) -> str | None:
    """As `shard_problem`, from the end of the file alone: recipe, columns and number of rows."""
    name, (start, stop) = layout.path(shard), layout.span(shard)
    if not (folder / name).is_file():
        return "is missing"
    try:
        path = inside(folder, name, "a shard")
    except ValueError as error:
        return f"is refused ({error})"
    stamp = shard_stamp(path)
    try:
        with pq.ParquetFile(path) as file:
            if stamp is None or stamp["recipe"] != layout.recipe:
                return "was not written by this recipe"
            if not file.schema_arrow.equals(layout.schema(shard)):
                return "has other columns than the manifest tells"
            if file.metadata.num_rows != stop - start:
                return f"has {file.metadata.num_rows} rows instead of {stop - start}"
    except (pa.ArrowException, OSError, ValueError) as error:
        return _unreadable(error)
    return None


def shard_problem(folder: Path, layout: Layout, shard: int) -> str | None:
    """Why a shard is not what it must be, in a few words; None if it is whole. Reads it all, a row group at a time."""
    problem = header_problem(folder, layout, shard)
    if problem is not None:
        return problem
    start, stop = layout.span(shard)
    rows = []
    try:
        with pq.ParquetFile(folder / layout.path(shard), page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                rows.append(table["row"].to_numpy())
                if any(table[name].null_count for name in table.column_names if name != "label"):
                    return "has gaps"
                for column in layout.columns:
                    values = (to_numpy(chunk, column.shape) for chunk in table[column.name].chunks)
                    if not all(np.isfinite(part).all() for part in values):
                        return f"holds NaN or infinity in {column.name!r}, which no extraction writes"
                for chunk in [] if layout.label is None else table["label"].chunks:
                    to_labels(getattr(layout.label, "names", None), chunk)
    except (pa.ArrowException, OSError, ValueError) as error:
        return _unreadable(error)
    if not np.array_equal(np.concatenate(rows), np.arange(start, stop)):
        return f"does not hold rows {start} to {stop - 1}"
    return None


def _unreadable(error: Exception) -> str:
    return f"cannot be read ({(str(error).splitlines() or ['damaged'])[0][:120]})"


def read_shard(folder: Path, layout: Layout, shard: int, name: str, batch_rows: int) -> Iterator[pa.Array]:
    """A column of a shard as Arrow arrays, `batch_rows` rows at a time.

    Raises:
        pyarrow.ArrowException, OSError: For a file that is broken.
    """
    with pq.ParquetFile(folder / layout.path(shard), page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=[name]):
            yield batch.column(name)


def to_numpy(array: pa.Array, shape: Sequence[int]) -> np.ndarray:
    """A feature column `(rows, *shape)`."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    rows = len(array)
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(rows, *shape)


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


def row_bytes(columns: Sequence[Column], dtype: str) -> int:
    """Bytes of one row's features."""
    return sum(math.prod(column.shape) for column in columns) * np.dtype(dtype).itemsize
