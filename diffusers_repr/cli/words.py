"""Messages of the library in the words of a command: flags for Python's arguments, commands for its functions."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers_repr.cli.guard import FORESEEN

_CALLS = {
    "`list_layers(denoiser)` shows": "`diffusers-repr layers MODEL` shows",
    "`list_layers(denoiser)`": "`diffusers-repr layers MODEL`",
    "; `match_layers` takes patterns": "",
    "`select_features` finds": "`diffusers-repr select` finds",
    "selection=select_features(...)": "--selection FOLDER",
    " (`hold_out`)": "",
    " See `hold_out`.": "",
    "; `hold_out` parts a train split": "",
}
_ARGUMENTS = {"class_labels": "class_label", "timestep": "timesteps", "test": "test_split", "samples": "limit"}
_VALUE = r"(\(H, W\)|<[^<>]*>|'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^()]*\)|\.\.\.|[\w+./:-]*\w)?"


def as_typed(text: str, names: tuple[str, ...]) -> str:
    """A message in the words of a command.

    Args:
        text: As the library says it.
        names: Of the command's settings.

    Example:
        >>> as_typed("Mixed sizes; pass image_size=(H, W). `list_layers(denoiser)` shows all.", ("image_size",))
        'Mixed sizes; pass --image_size H W. `diffusers-repr layers MODEL` shows all.'
        >>> as_typed("ensemble_size must be a whole number from 1; got 0.", ("ensemble_size",))
        '--ensemble_size must be a whole number from 1; got 0.'
    """
    for call, words in _CALLS.items():
        text = text.replace(call, words)
    known = {argument: argument for argument in names}
    known |= {argument: name for argument, name in _ARGUMENTS.items() if name in names and argument not in names}

    def given(found: re.Match[str]) -> str:
        name, value = known[found[1]], found[2] or ""
        return f"--{name} {_plain(value, name)}".rstrip()

    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    text = re.sub(rf"(?<![\w.'\"/-])({words})={_VALUE}", given, text)
    spelled = "|".join(name for name in sorted(known, key=len, reverse=True) if "_" in name)
    if spelled:  # a word with an underscore is no word of the language
        text = re.sub(rf"(?<![\w.'\"/-])({spelled})(?![\w'\"/=(.]\w|[\w'\"/=(])", lambda m: f"--{known[m[1]]}", text)
    return re.sub(r"(--\w+) \(\1\)", r"\1", text)


def _plain(value: str, name: str) -> str:
    """A value as it is typed behind a flag."""
    if value == "(H, W)":
        return "H W"
    if value in ("...", ""):
        return name.upper()
    if value[0] in "'\"":
        return value[1:-1]
    return value[1:-1].replace(",", "") if value[0] in "[(" else value


@contextmanager
def in_words_of(settings: Any) -> Iterator[None]:
    """Inside, what is raised and what is warned of speaks of the command's flags.

    Args:
        settings: The `Settings` of a command.
    """
    names = tuple(field.name for field in dataclasses.fields(settings))
    usual = warnings.formatwarning

    def plain(message: Warning | str, *more: Any, **others: Any) -> str:
        return usual(as_typed(str(message), names), *more, **others)

    warnings.formatwarning = plain
    try:
        yield
    except FORESEEN as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (as_typed(error.args[0], names),)
        raise
    finally:
        warnings.formatwarning = usual
