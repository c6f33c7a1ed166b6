"""`check_made`: what a recipe needs of another run and does not find is told with the command that makes it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusers_repr.config.recipe import read_recipe
from diffusers_repr.hub.errors import is_repo_id


def check_made(recipes: str | os.PathLike[str], **needed: str | Sequence[str] | None) -> None:
    """Refuse folders and files that are not there, before anything is loaded.

    A name that may be a Hub id passes, unless one of the recipes writes a folder of this name or tells how it is made.

    Args:
        recipes: Folder of YAML recipes; the comments of one hold the commands that belong to it.
        **needed: Settings with their values, one name or several.

    Raises:
        FileNotFoundError: Naming the setting, what is missing, and the command that makes it where a recipe tells.
    """
    for setting, value in needed.items():
        for name in [value] if isinstance(value, str) else value or ():
            if Path(name).expanduser().exists() or name == "none":
                continue
            hint = how_made(name, sorted(Path(recipes).glob("*.yaml")))
            if hint is None and is_repo_id(name) and not name.startswith("."):
                continue
            raise FileNotFoundError(f"--{setting}: there is no {name!r} here. {hint or 'Check the path.'}")


def how_made(name: str, recipes: Iterable[Path]) -> str | None:
    """What makes a folder: the command of the recipe that writes it, or the recipe whose comments tell.

    Args:
        name: Of the folder, as a recipe names it.
        recipes: YAML files.
    """
    told = None
    for path in recipes:
        text = path.read_text("utf-8")
        if name not in text:
            continue
        comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        if os.path.normpath(str(read_recipe(path).get("output_dir"))) == os.path.normpath(name):
            ran = (line.partition(" #")[0].strip() for line in comments if f"/{path.name}" in line)
            return f"This makes it: {next(ran, f'a run of the recipe {os.path.relpath(path)}')}"
        if "/" in name and any(name in line for line in comments):
            told = f"The first lines of {os.path.relpath(path)} tell how it is made."
    return told


__all__ = ["check_made", "how_made"]
