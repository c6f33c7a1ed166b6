"""`AssignmentStore`: class, vector or neighbours of every row of a data set, with the record of what assigned them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa

from diffusers_repr.hub.schema import Check, anything, integer, listing, mapping, one_of, optional, record
from diffusers_repr.store.manifest import (
    MAX_ROWS,
    SIDE,
    SPLIT,
    layout_schema,
    manifest_schema,
    recipe_hash,
)
from diffusers_repr.store.parquet import ParquetLayout, array_feature, row_bytes, to_numpy
from diffusers_repr.store.parquet_store import ParquetStore
from diffusers_repr.store.write import Plan, Spans, check_folder, choose_shard_size, write_store

Assign = Callable[[int, int], Mapping[str, np.ndarray]]
DTYPES = {"class_id": "int64", "neighbours": "int64", "distances": "float32", "vector": "float32"}
_KIND = "assignments"
_BOUND = optional(integer(1, MAX_ROWS))


@dataclass(frozen=True)
class AssignmentLayout(ParquetLayout):
    """Rows of `row` and one or more of `class_id`, `vector`, `neighbours` (rows, nearest first), `distances`.

    Attributes:
        columns: Shape of one row by column: `()` for a class, `(D,)` for a vector, `(k,)` for the others.
        num_classes: Classes there are; -1 is none of them.
        index_rows: Rows of the set that neighbours are of.
        split: Of the data set.
    """

    columns: dict[str, tuple[int, ...]]
    num_classes: int | None = None
    index_rows: int | None = None
    split: str = "train"
    kind: str = _KIND

    @property
    def stem(self) -> str:
        """The split."""
        return self.split

    def features(self) -> datasets.Features:
        """See `ParquetLayout`."""
        types = {
            name: array_feature(shape, DTYPES[name]) if shape else datasets.Value(DTYPES[name])
            for name, shape in self.columns.items()
        }
        return datasets.Features({"row": datasets.Value("int64"), **types})

    def table_problem(self, table: pa.Table) -> str | None:
        """See `ParquetLayout`."""
        for name, shape in self.columns.items():
            for chunk in table[name].chunks:
                problem = self.value_problem(name, to_numpy(chunk, shape))
                if problem is not None:
                    return problem
        return None

    def value_problem(self, name: str, values: np.ndarray) -> str | None:
        """What values of a column have wrong: ids out of range, NaN."""
        if name in ("distances", "vector"):
            return None if np.isfinite(values).all() else f"holds NaN or infinity in {name!r}"
        low, bound = (-1, self.num_classes) if name == "class_id" else (0, self.index_rows)
        if values.size and not (low <= values.min() and (bound is None or values.max() < bound)):
            return f"holds {name!r} outside {low} to {'...' if bound is None else bound - 1}"
        return None


class AssignmentStore(ParquetStore):
    """Class ids, vectors or neighbours of every row of a data set; made by `write_assignments`."""

    noun: ClassVar[str] = "store of assignments"
    command: ClassVar[str] = "write_assignments(...)"
    schema: ClassVar[Check] = staticmethod(
        manifest_schema(
            {
                "layout": layout_schema(
                    one_of(_KIND),
                    split=SPLIT,
                    columns=mapping(listing(SIDE, 0, 1), 1, len(DTYPES), keys=one_of(*DTYPES)),
                    num_classes=_BOUND,
                    index_rows=_BOUND,
                ),
                "recipe": record({"assigner": mapping(anything()), "data": mapping(anything())}),
                "about": mapping(anything()),
            }
        )
    )

    layout_type: ClassVar[type[AssignmentLayout]] = AssignmentLayout

    layout: AssignmentLayout

    @classmethod
    def agrees(cls, manifest: dict[str, Any], at: str) -> None:
        """See `Store`."""
        super().agrees(manifest, at)
        for name, shape in manifest["layout"]["columns"].items():
            if len(shape) != (name != "class_id"):
                raise ValueError(f"{at}: layout.columns.{name} is {shape}, which this column has not.")

    @property
    def assigner(self) -> dict[str, Any]:
        """The record of what assigned."""
        return self.recipe["assigner"]

    def array(self, name: str) -> np.ndarray:
        """All values of a column: `class_id` `(rows,)`, `vector` `(rows, D)`, `neighbours` or `distances` `(rows, k)`.

        Raises:
            KeyError: For a column that is not stored.
            ValueError: If a shard is corrupted.
        """
        if name not in self.layout.columns:
            raise KeyError(f"No column {name!r} in this store; there are {', '.join(self.layout.columns)}.")
        shape = self.layout.columns[name]
        return self._whole(shape, DTYPES[name], self._read(name, 65536, partial(_values, self.layout, name)))


def write_assignments(
    out: str | os.PathLike[str],
    rows: int,
    assign: Assign,
    *,
    assigner: Mapping[str, Any],
    data: Mapping[str, Any],
    num_classes: int | None = None,
    index_rows: int | None = None,
    split: str = "train",
    batch_size: int = 1024,
    shard_size: int | None = None,
    progress: bool = True,
) -> AssignmentStore:
    """Write what an assigner gives every row; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards.

    Args:
        out: Folder of the store; new, empty, or of an earlier call with the same records.
        rows: Of the data set.
        assign: Called with a first row and the row after the last: `class_id` `(n,)`, `vector` `(n, D)`, or
            `neighbours` and `distances` `(n, k)`, or several of them.
        assigner: Record of what assigns, as JSON: all that decides the values.
        data: Record of the data set, as JSON.
        num_classes: Classes there are.
        index_rows: Rows of the set that neighbours are of.
        split: Of the data set.
        batch_size: Rows of one call of `assign`.
        shard_size: Rows of a file; what an earlier call chose, else at most 256 MiB, if None.
        progress: Show a bar on the main process.

    Raises:
        FileExistsError: If the folder holds assignments of another record (tells what differs), or is none.
        ValueError: For columns, shapes or ids that cannot be.
        OSError: If the disk is full; what is written stays valid.
    """
    folder = Path(out)
    check_folder(folder)
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    columns = {name: np.shape(values)[1:] for name, values in assign(0, 1).items()}
    if not columns or not set(columns) <= set(DTYPES):
        raise ValueError(f"`assign` gives {', '.join(columns) or 'nothing'}; allowed are {', '.join(DTYPES)}.")
    recipe = {"assigner": dict(assigner), "data": {**data, "rows": rows}}
    size = choose_shard_size(AssignmentStore, folder, rows, 2 * row_bytes(list(columns.values()), "int64"), shard_size)
    layout = AssignmentLayout(rows, size, recipe_hash(recipe), columns, num_classes, index_rows, split)
    AssignmentStore.check_manifest(AssignmentStore.manifest_of(layout, recipe, {}, False), "the assignments")

    def batches(spans: Spans) -> Iterator[dict[str, Any]]:
        for start, stop in spans:
            for at in range(start, stop, batch_size):
                end = min(at + batch_size, stop)
                found = {name: _column(name, values) for name, values in assign(at, end).items()}
                shapes = {name: (end - at, *shape) for name, shape in columns.items()}
                if {name: values.shape for name, values in found.items()} != shapes:
                    raise ValueError(f"`assign` gave rows {at} to {end - 1} other columns or shapes than row 0.")
                for name, values in found.items():
                    problem = layout.value_problem(name, values)
                    if problem is not None:
                        raise ValueError(f"What `assign` gave rows {at} to {end - 1} {problem}.")
                yield {"row": np.arange(at, end), **found}

    write_store(Plan(AssignmentStore, folder, layout, recipe, batches, progress=progress, what="assign"))
    return AssignmentStore.open(folder)


def _column(name: str, values: Any) -> np.ndarray:
    """Values in the dtype of their column; a cast would round down what is no whole number."""
    values = np.asarray(values)
    if DTYPES[name] == "int64" and values.dtype.kind not in "iu":
        raise ValueError(f"`assign` gave {name!r} as {values.dtype}; give whole numbers.")
    return values.astype(DTYPES[name])


def _values(layout: AssignmentLayout, name: str, array: pa.Array) -> np.ndarray:
    values = to_numpy(array, layout.columns[name])
    problem = layout.value_problem(name, values)
    if problem is not None:
        raise ValueError(problem)
    return values
