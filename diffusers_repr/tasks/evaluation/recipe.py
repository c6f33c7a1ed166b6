"""`EvaluationRecipe`: what is measured of what, as a YAML file with sections for source, fit, data and measure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_repr.config.recipe import check_keys, read_recipe
from diffusers_repr.hub import schema

RANDOM = "random:"  # before a base: the same network untrained
SECTIONS = ("source", "fit", "data", "measure")
_NOT_THE_RESULT = (
    "name",
    "seeds",
    "batch_size",
)  # what an evaluation that is there may differ in, and be gone on with
_SECTION = schema.mapping(schema.anything(6), 0, 100)
_CHECKS: dict[str, schema.Check] = {
    "name": schema.optional(schema.text(200)),
    "task": schema.text(100),
    "base": schema.text(1000),
    "load": schema.text(1000),
    "revision": schema.optional(schema.text(200)),
    "dtype": schema.one_of("float32", "bfloat16", "float16"),
    "seeds": schema.listing(schema.integer(0, (1 << 63) - 1), 1, 1000, distinct=True),
    "batch_size": schema.optional(schema.integer(1, 1 << 20)),
    **dict.fromkeys(SECTIONS, _SECTION),
}


@dataclasses.dataclass(frozen=True)
class EvaluationRecipe:
    """One evaluation.

    Attributes:
        file: Where it was read from, for messages.
        name: Of its row in a table.
        task: Of `list_tasks`.
        base: Folder or Hub id of the model; `random:` before it takes the same network untrained. With `load` that of
            the saved task if None.
        source: How features are made: `name` of `list_sources` (`plain` if there is none) and its settings; None: as
            the task does by itself.
        fit: How the task is fitted.
        load: Folder or Hub id of a saved task, which is measured as it is; nothing is fitted.
        data: What it is fitted to and measured on: `path`, `train`, `validation`, `measure`, and how they are opened.
        measure: How it is measured.
        seeds: Of noise, fitting, the training images that are drawn, and an untrained network's weights.
        revision: Of the base on the Hub.
        dtype: Of the base.
        batch_size: Images a forward; that of the task if None.
    """

    file: str
    name: str
    task: str
    data: Mapping[str, Any]
    base: str | None = None
    load: str | None = None
    source: Mapping[str, Any] | None = None
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    revision: str | None = None
    dtype: str = "float32"
    batch_size: int | None = None

    @property
    def random(self) -> bool:
        """Whether the base is taken untrained."""
        return self.base is not None and self.base.startswith(RANDOM)

    @property
    def base_name(self) -> str:
        """The base without `random:`; empty if there is none."""
        return (self.base or "").removeprefix(RANDOM)

    @property
    def reads(self) -> str:
        """The source in a few words, for tables."""
        if self.source is None:
            return "as the task does" if self.load is None else "as it was saved"
        words = [str(self.source.get("name", "plain"))]
        for key, value in self.source.items():
            if key != "name":
                shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                words.append(f"{key} {shown}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Its keys as `read_evaluation` reads them; what is None is left out."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "file"}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in named.items()}
        return {key: value for key, value in plain.items() if value is not None and value != {}}

    def differing(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from the keys of another in what the results depend on: `key: there -> now`."""
        there, now = flat(other), flat(self.to_dict())
        keys = [key for key in dict.fromkeys((*there, *now)) if key.partition(".")[0] not in _NOT_THE_RESULT]
        return [f"{key}: {there.get(key)!r} -> {now.get(key)!r}" for key in keys if there.get(key) != now.get(key)]


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of sections as `section.key`."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def read_evaluation(path: str | os.PathLike[str], seeds: list[int] | None = None) -> EvaluationRecipe:
    """The recipe in a YAML file; its keys are checked, those in the sections by `check_recipe`.

    `like:` names a recipe beside it that it differs from: keys take the place of that one's, those of sections each by
    itself; null takes a key, or a whole section, away.

    Args:
        path: The file.
        seeds: In place of its seeds.

    Raises:
        FileNotFoundError: If it is not there, or what it is `like`.
        ValueError: For an unknown key or a value of another kind; names file and key.
    """
    file = Path(path)
    given = _merged(file, ())
    merged = {"seeds": [0] if "load" in given else [0, 1, 2], "dtype": "float32", **given}
    if seeds is not None:
        merged["seeds"] = seeds
    fields = {key: _CHECKS[key](value, f"{file.name}: {key}") for key, value in merged.items()}
    for key in ("task", "data", *(() if "load" in fields else ("base",))):
        if key not in fields:
            raise ValueError(f"{file.name} has no {key!r}, which an evaluation needs.")
    if "load" in fields:
        _check_loaded(file.name, fields, own_seeds="seeds" in given or seeds is not None)
    fields["seeds"] = tuple(fields["seeds"])
    return EvaluationRecipe(**{"file": file.name, **fields, "name": fields.get("name") or file.stem})


def _check_loaded(place: str, fields: Mapping[str, Any], own_seeds: bool) -> None:
    """Refuse what a saved task has settled."""
    if fields.get("fit"):
        raise ValueError(f"{place}: fit: a saved task (load) is not fitted again; leave out one of them.")
    if own_seeds and len(fields["seeds"]) > 1:
        raise ValueError(f"{place}: seeds: a saved task (load) is measured once; leave them out.")
    learned = [key for key in ("train", "validation", "train_limit") if key in fields["data"]]
    if learned:
        raise ValueError(f"{place}: data.{learned[0]}: a saved task (load) learns nothing; leave it out.")
    if str(fields.get("base", "")).startswith(RANDOM):
        raise ValueError(f"{place}: base: a saved task (load) was fitted on trained weights; leave out {RANDOM!r}.")


def _merged(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a file over that of the one it is like."""
    if file.resolve() in seen:
        raise ValueError(f"{file.name}: like: {seen[0].name} is like itself.")
    if not file.is_file():
        beside = sorted(one.name for one in file.parent.glob("*.yaml"))
        raise FileNotFoundError(f"There is no recipe {str(file)!r}; beside it: {beside}.")
    own = read_recipe(file)
    check_keys(file.name, own, [*_CHECKS, "like"])
    other = own.pop("like", None)
    if other is None:
        return {key: value for key, value in own.items() if value is not None}
    schema.text(1000)(other, f"{file.name}: like")
    found = _merged(file.parent / other, (*seen, file.resolve()))
    found.pop("name", None)
    for key, value in own.items():
        if key in SECTIONS and isinstance(value, dict) and isinstance(found.get(key), dict):
            value = {k: v for k, v in {**found[key], **value}.items() if v is not None}
        found[key] = value
    return {key: value for key, value in found.items() if value is not None}


__all__ = ["RANDOM", "EvaluationRecipe", "flat", "read_evaluation"]
