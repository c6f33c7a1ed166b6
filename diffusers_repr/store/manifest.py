"""`manifest.json` of a store: recipes, how they differ, and what every manifest must say before it is counted by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from diffusers_repr.hub.schema import Check, anything, boolean, digest, integer, mapping, one_of, record, text

MANIFEST = "manifest.json"
MAX_ROWS, MAX_SHARDS = 10**11, 1_000_000
SIDE = integer(1, 1 << 24)  # one dimension of what a row holds
SPLIT = text(200, pattern=r"[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", what="the name of a split, without '/'")


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """A short name of a recipe; every shard carries it.

    Example:
        >>> recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1})
        True
    """
    text = json.dumps(recipe, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def recipe_differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Lines `place: old -> new` for all that differs.

    Example:
        >>> recipe_differences({"seed": 0, "data": {"rows": 5}}, {"seed": 1, "data": {"rows": 5}})
        ['seed: 0 -> 1']
        >>> recipe_differences({"sigma": [0.09096876049468036]}, {"sigma": [0.5]})
        ['sigma: [0.0909688] -> [0.5]']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in recipe_differences(old.get(k), new.get(k), f"{at}.{k}" if at else str(k))]
    if old == new:
        return []
    there, now = json.dumps(_rounded(old)), json.dumps(_rounded(new))
    return [f"{at}: {there} -> {now}" if there != now else f"{at}: {json.dumps(old)} -> {json.dumps(new)}"]


def _rounded(value: Any) -> Any:
    """Numbers of six digits, for people, in all depths."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def manifest_schema(required: Mapping[str, Check]) -> Check:
    """The schema of a whole manifest, from the fields of its kind."""
    return record({"complete": boolean(), **required}, {"format": one_of(1), "versions": mapping(text(1000))})


def layout_schema(kind: Check, **fields: Check) -> Check:
    """The schema of `layout`: kind, rows, shards and recipe, and the fields of its own."""
    counts = {"rows": integer(1, MAX_ROWS), "shard_size": integer(1, MAX_ROWS), "shards": integer(1, MAX_SHARDS)}
    return record({"kind": kind, **counts, "recipe": digest(), **fields})


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
            f"{error} The {MANIFEST} is damaged, or of another version or kind of store. If `{command}` made this "
            "folder, delete the manifest and run the same command again: whole shards of this recipe are kept."
        ) from error
    return manifest


def count_shards(counts: Mapping[str, Any], at: str) -> None:
    """Raise ValueError unless `shards` of `shard_size` rows hold `rows`."""
    rows, shard_size, said = counts["rows"], counts["shard_size"], counts["shards"]
    if said != -(-rows // shard_size):
        raise ValueError(f"{at}: {rows} rows in shards of {shard_size} are not {said} shards.")
