"""What a command leaves beside its result: its own recipe, by which the same command is told from another one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_repr.cli.options import Out, save_or_keep
from diffusers_repr.config.recipe import read_recipe, to_yaml

RECIPE = "recipe.yaml"
_NOT_KEPT = ("out", "overwrite", "quiet", "json")
# What changes neither the result nor where it comes from.
_OF_THE_RUN = (*_NOT_KEPT, "device", "batch_size", "memory_gib", "no_heatmap", "no_plot")


def recipe_of(settings: Any) -> dict[str, Any]:
    """The settings of a command as its recipe, which `--config` reads; what is None is left out.

    Args:
        settings: The `Settings` of a command.
    """
    named = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in named.items() if value is not None and name not in _NOT_KEPT}


def save_result(settings: Any, what: str, save: Callable[[Path], object]) -> None:
    """Save the result of a command and its recipe to `--out`, or keep both elsewhere; see `save_or_keep`."""
    from diffusers_repr.hub.files import atomic_write

    def both(folder: Path) -> None:
        save(folder)
        atomic_write(folder / RECIPE, to_yaml(recipe_of(settings)))

    save_or_keep(both, settings.out, what)


def refuse_other_recipe(settings: Any, out: Out) -> None:
    """Refuse to replace what another command made in `--out`.

    Raises:
        FileExistsError: With the settings that differ.
    """
    folder = Path(settings.out)
    if not any(any(folder.glob(mark)) for mark in out.marks):
        return
    again = "Name another folder, or add --overwrite to replace it."
    if not (folder / RECIPE).is_file():
        raise FileExistsError(
            f"--out {settings.out!r} holds a {out.what}, and no {RECIPE} that tells which command made it. {again}"
        )
    there, now = read_recipe(folder / RECIPE), recipe_of(settings)
    differing = [
        f"{name}: {_shown(there.get(name))} -> {_shown(now.get(name))}"
        for name in dict.fromkeys((*there, *now))
        if there.get(name) != now.get(name) and name not in _OF_THE_RUN
    ]
    if differing:
        raise FileExistsError(
            f"--out {settings.out!r} holds a {out.what} of another recipe; nothing was changed. What differs "
            f"(there -> now): {'; '.join(differing)}. {again}"
        )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)
