"""`Store`: what every kind of store is read by; a kind says what its manifest tells and how its rows lie."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers_repr.hub import read_json
from diffusers_repr.hub.schema import Check
from diffusers_repr.store.manifest import MANIFEST, checked_manifest, count_shards
from diffusers_repr.store.shards import Layout, shard_problem

_PACKAGES = ("diffusers-repr", "torch", "diffusers", "transformers", "datasets")


class Store:
    """A folder of shards in `data/` with a `manifest.json`, made by `write_store`.

    Attributes:
        noun: What it is called in messages.
        command: What makes it.
        schema: Of its manifest.
        layout_type: Of its layout.
        folder: Where it lies.
        manifest: Recipe, layout and versions, as written.
        layout: Rows, shards and columns.
    """

    noun: ClassVar[str]
    command: ClassVar[str]
    schema: ClassVar[Check]
    layout_type: ClassVar[type[Layout]]
    elsewhere: ClassVar[str] = "another folder"

    layout: Layout

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, self.check_manifest(manifest)
        self.layout = self.layout_of(manifest)

    @classmethod
    def layout_of(cls, manifest: Mapping[str, Any]) -> Any:
        """The layout that a checked manifest tells."""
        return cls.layout_type.from_dict(manifest["layout"])

    @classmethod
    def describe(cls, layout: Any, recipe: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a manifest that are the kind's own: its layout and recipe; the inverse of `layout_of`."""
        return {"layout": layout.to_dict(), "recipe": dict(recipe), "about": dict(about)}

    @classmethod
    def agrees(cls, manifest: dict[str, Any], at: str) -> None:
        """Raise ValueError for a manifest whose numbers do not fit together."""
        count_shards(manifest["layout"], at)

    @classmethod
    def card(cls, manifest: dict[str, Any]) -> str | None:
        """README.md of a finished store; None: none is written."""
        return None

    @classmethod
    def manifest_of(
        cls, layout: Any, recipe: Mapping[str, Any], about: Mapping[str, Any], complete: bool
    ) -> dict[str, Any]:
        """What `manifest.json` holds."""
        return {
            "format": 1,
            "complete": complete,
            **cls.describe(layout, recipe, about),
            "versions": {name: version(name) for name in _PACKAGES},
        }

    @classmethod
    def check_manifest(cls, manifest: Any, at: str = MANIFEST) -> dict[str, Any]:
        """A manifest, if it is one of this kind.

        Raises:
            ValueError: Else; names file, field and remedy.
        """
        return checked_manifest(manifest, at, cls.schema, cls.agrees, cls.command)

    @classmethod
    def read_manifest(cls, folder: Path) -> dict[str, Any]:
        """The checked manifest of a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, of another version, or says what cannot be; names file and field.
        """
        return cls.check_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))

    @classmethod
    def open_folder(cls, folder: Path, noun: str | None = None) -> Self:
        """Open a finished store.

        Args:
            folder: Where it lies.
            noun: What it is called in messages, where a class has several kinds.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no store.
            ValueError: If it is not finished, a shard is missing, or the manifest is damaged.
        """
        noun = noun or cls.noun
        if not (folder / MANIFEST).is_file():
            held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing" if folder.is_dir() else None
            raise FileNotFoundError(
                f"{str(folder)!r} is no {noun}: it has no {MANIFEST} "
                f"({f'it holds {held}' if held else 'no such folder'}). `{cls.command} ...` makes one."
            )
        store = cls(folder, cls.read_manifest(folder))
        layout = store.layout
        names = {f"data/{file.name}" for file in (folder / "data").glob(f"*.{layout.suffix}")}
        there = [n for n in range(layout.shards) if layout.path(n) in names] if names else []
        if len(there) < layout.shards or not store.manifest["complete"]:
            rows = sum(stop - start for start, stop in map(layout.span, there))
            lost = next(
                (f", {layout.path(n)} is not" for n in range(layout.shards) if layout.path(n) not in names), ""
            )
            raise ValueError(
                f"The {noun} {str(folder)!r} is not finished: {rows} of {layout.rows} rows ({len(there)} of "
                f"{layout.shards} shards) are there{lost}. Run {cls._again()}"
            )
        return store

    def __len__(self) -> int:
        return self.layout.rows

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the values."""
        return self.manifest["recipe"]

    def verify(self) -> None:
        """Read every shard and check it against checksums, recipe and row numbers.

        Raises:
            ValueError: For the first shard that is not whole; names the file and the remedy.
        """
        self._check_shards(content=True)

    def _check_shards(self, *, content: bool = False) -> None:
        for shard in range(self.layout.shards):
            self._check_shard(shard, content=content)

    def _check_shard(self, shard: int, *, content: bool = False) -> None:
        problem = shard_problem(self.folder, self.layout, shard, content=content)
        if problem is not None:
            raise self._broken(shard, problem)

    def _broken(self, shard: int, problem: str) -> ValueError:
        path = str(self.folder / self.layout.path(shard))
        return ValueError(f"Shard {path!r} {problem}. Delete it and run {self._again()}")

    @classmethod
    def _again(cls) -> str:
        return f"the same `{cls.command}` command again: it keeps whole shards and writes the others."
