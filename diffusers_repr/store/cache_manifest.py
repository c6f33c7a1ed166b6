"""`manifest.json` of a cache of latents or features: what it must say, checked before anything is counted by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_repr.hub import read_json
from diffusers_repr.hub.schema import (
    anything,
    boolean,
    digest,
    integer,
    listing,
    mapping,
    one_of,
    optional,
    record,
    text,
)
from diffusers_repr.store.manifest import MANIFEST, MAX_ROWS, MAX_SHARDS, checked_manifest, count_shards

KINDS = ("latents", "features")
_SIDE = integer(1, 1 << 24)
_WORD = text(200, pattern=r"\w[\w.-]*", what="a name of letters, digits, '_', '.', '-'")
_SCHEMA = record(
    {
        "complete": boolean(),
        "layout": record(
            {
                "kind": one_of(*KINDS),
                "rows": integer(1, MAX_ROWS),
                "shard_size": integer(1, MAX_ROWS),
                "shards": integer(1, MAX_SHARDS),
                "tensors": mapping(listing(_SIDE, 1, 6), 1, 100, keys=_WORD),
                "dtype": one_of("float32", "float16"),
                "recipe": digest(),
            }
        ),
        "recipe": record({"mirrors": integer(1, 2), "dtype": one_of("float32", "float16")}, others=True),
        "about": record(
            {},
            {
                "name": text(1000),
                "fingerprint": mapping(anything()),
                "grid": listing(_SIDE, 2, 2),
                "vae": optional(text()),
                "revision": optional(text(1000)),
            },
            others=True,
        ),
    },
    {"format": one_of(1), "versions": mapping(text(1000))},
)
_COLUMNS = {"latents": {"moments"}, "features": {"tokens", "global"}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a cache, as it is written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, of another version, or says what cannot be; names file and field.
    """
    return check_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))


def check_manifest(manifest: Any, at: str = MANIFEST) -> dict[str, Any]:
    """A manifest, if it is one; arguments and errors as the checks of `hub.schema`."""
    return checked_manifest(manifest, at, _SCHEMA, _agrees, "examples/cache_latents.py")


def _agrees(manifest: dict[str, Any], at: str) -> None:
    layout, about = manifest["layout"], manifest["about"]
    count_shards(layout["rows"], layout["shard_size"], layout["shards"], at)
    if layout["dtype"] != manifest["recipe"]["dtype"]:
        raise ValueError(f"{at}: layout.dtype and recipe.dtype do not tell the same.")
    tensors = layout["tensors"]
    if not set(tensors) <= _COLUMNS[layout["kind"]]:
        raise ValueError(f"{at}: layout.tensors has {', '.join(tensors)}, which a cache of {layout['kind']} has not.")
    for name, shape in tensors.items():
        if shape[0] != manifest["recipe"]["mirrors"]:
            raise ValueError(f"{at}: layout.tensors.{name} has not the mirrors that recipe.mirrors says.")
    if layout["kind"] == "features" and not {"name", "fingerprint", "grid"} <= set(about):
        raise ValueError(f"{at}: about lacks the name, fingerprint or grid of the encoder.")
