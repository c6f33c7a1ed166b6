"""`manifest.json` of a feature store: what it must say, checked before anything is opened or counted by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from diffusers_repr.hub import read_json
from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.schema import (
    Check,
    anything,
    boolean,
    digest,
    integer,
    listing,
    mapping,
    number,
    one_of,
    optional,
    record,
    text,
)
from diffusers_repr.store.shards import Column, Layout

MANIFEST = "manifest.json"
MAX_ROWS, MAX_SHARDS = 10**11, 1_000_000
_SIDE = 1 << 24  # of one dimension of a feature
_NAME = text(1000)

_COLUMN = record(
    {
        "name": _NAME,
        "layer": _NAME,
        "level": integer(0, 100_000),
        "timestep": number(),
        "shape": listing(integer(1, _SIDE), 1, 4),
    },
    {"grid": optional(listing(integer(1, _SIDE), 2, 2)), "text_tokens": integer(0, _SIDE)},
)
_SPLIT = text(
    200, pattern=r"[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", what="the name of a split, without '/'"
)
_DATA = record(
    {
        "name": text(),
        "split": _SPLIT,
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
_SCHEMA = record(
    {
        "complete": boolean(),
        "recipe_hash": digest(),
        "rows": integer(1, MAX_ROWS),
        "shard_size": integer(1, MAX_ROWS),
        "shards": integer(1, MAX_SHARDS),
        "label": optional(record({"names": optional(listing(_NAME, 1, distinct=True))})),
        "columns": listing(_COLUMN, 1, 100_000),
        "recipe": record({"model": _MODEL, "data": _DATA, "features": _FEATURES}),
    },
    {"format": one_of(1), "versions": mapping(text(1000))},
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a store, as it is written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, of another version, or says what cannot be; names file and field.
    """
    return check_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))


def check_manifest(manifest: Any, at: str = MANIFEST) -> dict[str, Any]:
    """A manifest, if it is one; arguments and errors as the checks of `hub.schema`."""
    return checked_manifest(manifest, at, _SCHEMA, _agrees, "diffusers-repr extract")


def checked_manifest(
    manifest: Any, at: str, schema: Check, agrees: Callable[[dict[str, Any], str], None], command: str
) -> dict[str, Any]:
    """A manifest whose values `schema` allows and whose numbers `agrees` (it raises ValueError) finds to fit together.

    Args:
        manifest: What the file holds.
        at: Its place, for messages.
        schema: Of the whole.
        agrees: Called with manifest and place.
        command: What makes it anew.

    Raises:
        ValueError: Else; names file, field and remedy.
    """
    try:
        schema(anything(finite=True)(manifest, at), at)
        agrees(manifest, at)
    except ValueError as error:
        raise ValueError(
            f"{error} The {MANIFEST} is damaged or of another version. Delete it and run the same `{command}` command "
            "again: whole shards of this recipe are kept."
        ) from error
    return manifest


def count_shards(rows: int, shard_size: int, said: int, at: str) -> None:
    """Raise ValueError unless `said` shards of `shard_size` hold `rows`."""
    if said != -(-rows // shard_size):
        raise ValueError(f"{at}: {rows} rows in shards of {shard_size} are not {said} shards.")


def _agrees(manifest: Mapping[str, Any], at: str) -> None:
    count_shards(manifest["rows"], manifest["shard_size"], manifest["shards"], at)
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


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The layout that a checked manifest tells."""
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
