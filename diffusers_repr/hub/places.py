"""Names of folders and files of this machine, which do not belong into what others read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# Keys whose value names a model, a data set or a file; a place stands there even if it is gone by now.
_KEYS = re.compile(r"(^|_)(name|path|file|dir|folder|dataset|base|model|vae|encoder|teacher)$|name_or_path$")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def is_place(value: object) -> bool:
    r"""Whether a text names a place of this machine: an absolute or home folder, or one that climbs out by `..`.

    Example:
        >>> [is_place(text) for text in ("/data/cats", "~/cats", "..\\cats", "C:\\cats", "user/cats", "./cats")]
        [True, True, True, True, False, False]
    """
    if not isinstance(value, str) or not value:
        return False
    pieces = re.split(r"[\\/]", value)
    home = value.startswith("~") and len(pieces) > 1
    return value.startswith(("/", "file:")) or home or bool(_WINDOWS.match(value)) or ".." in pieces


def last_name(place: str) -> str:
    r"""The last piece of a place, which tells nothing of the machine.

    Example:
        >>> last_name("/home/me/cats/"), last_name("C:\\data\\cats"), last_name("../..")
        ('cats', 'cats', 'folder')
    """
    path = PureWindowsPath(place) if _WINDOWS.match(place) or "/" not in place else PurePosixPath(place)
    name = path.name
    return "folder" if name in ("", "..", ".", "~") else name


def public_name(name: str) -> str:
    """A Hub id or relative folder as it is; of a place, its last name."""
    return last_name(name) if is_place(name) else name


def short_name(name: str) -> str:
    """A Hub id as it is; of any folder, one of this machine or a relative one, its last name: for titles.

    Example:
        >>> short_name("org/name"), short_name("outputs/runs/tuned"), short_name("/data/cats")
        ('org/name', 'tuned', 'cats')
    """
    hub = name.count("/") <= 1 and not is_place(name) and not os.path.exists(name)
    return name if hub else last_name(name)


def without_places(value: Any) -> Any:
    """Settings with last names in place of the places in them, in all depths.

    Example:
        >>> without_places({"vae": "/models/vae", "sizes": [8], "encoder": ["org/name", "~/teacher"]})
        {'vae': 'vae', 'sizes': [8], 'encoder': ['org/name', 'teacher']}
    """
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def public_config(value: Any, replaced: dict[str, str], key: str = "") -> Any:
    """A config without the places of this machine; other texts that begin like one stay (a label, a prompt).

    Args:
        value: What JSON gave.
        replaced: Takes up each place and what stands there now.
        key: Under which `value` stands.
    """
    if isinstance(value, Mapping):
        return {k: public_config(item, replaced, str(k)) for k, item in value.items()}
    if isinstance(value, list):
        return [public_config(item, replaced, key) for item in value]
    if is_place(value) and (_KEYS.search(key) or _is_here(value)):
        replaced[value] = last_name(value)
        return replaced[value]
    return value


def private_places(text: str, folder: Path) -> list[tuple[int, str]]:
    """Lines of a text that tell the home folder, or where `folder` lies: (line from 1, the place)."""
    known = [str(Path.home()), os.path.abspath(folder), os.path.realpath(folder)]
    places = [place for place in dict.fromkeys(known) if place.count(os.sep) > 1 or place == "/root"]
    return [
        (number, place)
        for number, line in enumerate(text.splitlines(), 1)
        for place in places
        if re.search(rf"(?<![\w.-]){re.escape(place)}(?![\w-])", line)
    ]


def _is_here(value: str) -> bool:
    try:
        return value.count("/") + value.count("\\") > 1 and Path(value.removeprefix("file://")).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return False
