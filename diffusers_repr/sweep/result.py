"""What every sweep returns: cells with scores, one of them the best; a table, files, a picture."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers_repr.hub import read_json
from diffusers_repr.hub.files import atomic_files, json_text
from diffusers_repr.hub.schema import Check, anything, integer, number, text

R = TypeVar("R", bound="SweepResult")

NAME = text(1000)
CELL: dict[str, Check] = {
    "layer": NAME,
    "order": integer(0, 100_000),
    "timestep": number(),
    "nsr": number(0),
    "flops_share": number(0, 1.001),
    "dim": integer(1, 1 << 31),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Cell:
    """One layer at one noise level.

    Attributes:
        layer: Full module path.
        order: Place of the layer in execution order, from 0.
        timestep: As the network is told.
        nsr: Noise-to-signal ratio of the level.
        flops_share: Share of the forward's FLOPs spent when the layer is done.
        dim: Length of the feature.
    """

    layer: str
    order: int
    timestep: float
    nsr: float
    flops_share: float
    dim: int

    def __repr__(self) -> str:
        parts = ", ".join(f"{field.name}={shown(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({parts})"


def shown(value: Any) -> str:
    """A value as people read it: numbers of four digits, texts as they are in Python."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(part)}" for key, part in value.items()) + "}"
    return f"({', '.join(map(shown, value))})" if isinstance(value, tuple) else repr(value)


class SweepResult(ABC):
    """Base of what sweeps return; frozen dataclasses below it.

    Attributes:
        cells: Every cell.
        recipe: Everything else that was asked for or found.
    """

    cells: tuple[Any, ...]
    recipe: Mapping[str, Any]

    kind: ClassVar[str]  # in messages and in the name of the file
    fields: ClassVar[Check]  # of the file, besides its format

    @classmethod
    def format(cls) -> str:
        """What the file says it is."""
        return f"diffusers_repr.{cls.kind}/1"

    def table(self) -> list[dict[str, Any]]:
        """One flat dictionary a cell, in the order of `cells`, for a data frame."""
        return [asdict(cell) for cell in self.cells]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the cells, of which there are many, come last."""
        values = asdict(self)  # type: ignore[call-overload]
        return {"format": self.format(), **{k: v for k, v in values.items() if k != "cells"}, "cells": values["cells"]}

    @classmethod
    @abstractmethod
    def _from_dict(cls: type[R], data: dict[str, Any], at: str) -> R:
        """The result of what the schema has let through; `at` is the file."""

    def _save(
        self,
        folder: str | os.PathLike[str],
        more: Mapping[str, bytes],
        picture: tuple[str, Callable[[], bytes]] | None,
    ) -> Path:
        folder = Path(folder)
        name = f"{self.kind}.json"
        files: dict[str, bytes | str] = {name: json_text(self.to_dict(), folder / name), **more}
        missing: ImportError | None = None
        if picture is not None:
            try:
                files[picture[0]] = picture[1]()
            except ImportError as error:
                missing = error
        atomic_files(folder, files)
        if missing is not None:
            raise missing
        return folder

    @classmethod
    def load(cls: type[R], folder: str | os.PathLike[str]) -> R:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If its JSON file is not there.
            ValueError: If it is none of this format, or says what cannot be; names file and field.
        """
        path = Path(folder) / f"{cls.kind}.json"
        if not path.is_file():
            raise FileNotFoundError(f"No {cls.kind} in {str(folder)!r}: it has no {path.name}.")
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != cls.format():
            raise ValueError(f"{str(path)!r} is no {cls.kind} of format {cls.format()!r}; make it again.")
        cls.fields(anything(finite=True)(data, str(path)), str(path))
        return cls._from_dict(data, str(path))


class DrawnResult(SweepResult):
    """A sweep that is saved as numbers and one picture, `<kind>.json` and `<kind>.png`."""

    @abstractmethod
    def plot(self) -> bytes:
        """PNG; needs matplotlib."""

    def save(self, folder: str | os.PathLike[str], plot: bool = True) -> Path:
        """Write the numbers and the picture into a folder: `alignment.json` and `.png`, of several `alignments`.

        Args:
            folder: Made if missing; files of these names are replaced together, when both are whole.
            plot: Whether to draw the picture.

        Raises:
            ImportError: If matplotlib is missing; the numbers are written before.
            OSError: If the disk is full; what was in the folder stays as it was, and saving again may succeed.
        """
        return self._save(folder, {}, (f"{self.kind}.png", self.plot) if plot else None)


def tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
