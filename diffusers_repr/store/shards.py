"""Shards: files of fixed rows that are whole or not there, each with its recipe's name inside.

`Layout` says how rows lie in files. What a file is, Parquet or safetensors, a subclass says: `store/parquet.py`,
`store/tensors.py`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import pyarrow as pa
from safetensors import SafetensorError

from diffusers_repr.hub import atomic_file
from diffusers_repr.hub.schema import inside, integer, record, text

STAMP = "diffusers_repr"  # the key of the stamp in a file's metadata
UNREADABLE = (pa.ArrowException, SafetensorError, OSError, ValueError, RecursionError)
_STAMPED = record({"recipe": text(200), "shard": integer(0), "start": integer(0)}, {"checksum": text(200)})


Append = Callable[[Mapping[str, Any]], None]  # takes the next rows of a shard: values `(rows, ...)` by column


@dataclass(frozen=True)
class Layout(ABC):
    """How rows lie in files.

    Attributes:
        rows: Rows in all.
        shard_size: Rows of every shard but the last.
        recipe: Name of the recipe, from `recipe_hash`.
    """

    suffix: ClassVar[str]

    rows: int
    shard_size: int
    recipe: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_size)

    @property
    @abstractmethod
    def stem(self) -> str:
        """What the names of files begin with."""

    def path(self, shard: int) -> str:
        """File of a shard inside the store."""
        return f"data/{self.stem}-{shard:05d}-of-{self.shards:05d}.{self.suffix}"

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows)

    def place(self, shard: int) -> dict[str, Any]:
        """What a shard's stamp says of recipe and place."""
        return {"recipe": self.recipe, "shard": shard, "start": self.span(shard)[0]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return json.loads(json.dumps({**asdict(self), "shards": self.shards}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, lists for tuples allowed."""
        return cls(**{field.name: with_tuples(values[field.name]) for field in fields(cls)})

    @abstractmethod
    def writer(self, file: BinaryIO, shard: int) -> AbstractContextManager[Append]:
        """Gives what appends rows to an open file, which is whole when the block ends well."""

    @abstractmethod
    def stamp(self, path: Path) -> str | bytes | None:
        """The stamp of a file, not parsed; None for a file without one. A broken file raises one of `UNREADABLE`."""

    @abstractmethod
    def header_problem(self, path: Path, shard: int) -> str | None:
        """What a file's own table of contents has wrong: columns, shapes, dtypes, number of rows."""

    @abstractmethod
    def content_problem(self, path: Path, shard: int) -> str | None:
        """What its values have wrong; reads them all."""


def with_tuples(value: Any) -> Any:
    """A value of JSON with tuples for lists."""
    if isinstance(value, Mapping):
        return {key: with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def parse_stamp(stamp: str | bytes | None) -> dict[str, Any]:
    """What a stamp says of recipe and place; nothing where it is none of ours."""
    try:
        return {} if stamp is None else _STAMPED(json.loads(stamp), "its stamp")
    except (ValueError, RecursionError):
        return {}


def shard_recipe(layout: Layout, path: Path) -> str | None:
    """The name of the recipe a file was written by; None for a file that does not say, or is broken."""
    try:
        return parse_stamp(layout.stamp(path)).get("recipe")
    except UNREADABLE:
        return None


def shard_problem(folder: Path, layout: Layout, shard: int, *, content: bool = True) -> str | None:
    """Why a shard is not what it must be, in a few words; None if it is whole.

    Args:
        folder: Of the store.
        layout: Of the store.
        shard: Its number.
        content: Read it all; else its table of contents alone.
    """
    name = layout.path(shard)
    if not (folder / name).is_file():
        return "is missing"
    try:
        path = inside(folder, name, "a shard")
    except ValueError as error:
        return f"is refused ({error})"
    try:
        stamp = parse_stamp(layout.stamp(path))
        if {key: stamp.get(key) for key in ("recipe", "shard", "start")} != layout.place(shard):
            return "was not written by this recipe"
        problem = layout.header_problem(path, shard)
        return layout.content_problem(path, shard) if problem is None and content else problem
    except UNREADABLE as error:
        return f"cannot be read ({(str(error).splitlines() or ['damaged'])[0][:120]})"


@contextmanager
def write_shard(folder: Path, layout: Layout, shard: int) -> Iterator[Append]:
    """Fill a shard; it takes its name, flushed to disk, when the block ends well.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an existing shard is untouched then.
    """
    with atomic_file(folder / layout.path(shard)) as file, layout.writer(file, shard) as append:
        yield append
