"""The one check of what is read from outside: a JSON value against a schema with bounds, before anything uses it.

A schema is built from small checks. Each takes a value and the name of its place and returns the value, or raises a
`ValueError` that says what came, what is allowed and where:

    PROBE = record({"seed": integer(0), "layers": listing(text(), 1, 1000)}, {"prompt": optional(text())})
    recipe = PROBE(read_json(path), path)
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

Check = Callable[[Any, str], Any]

MAX_TEXT = 100_000
MAX_ITEMS = 1_000_000
_SHOWN = 60
_HASH = re.compile(r"[0-9a-f]{8,128}")


def integer(low: int | None = None, high: int | None = None) -> Check:
    """A whole number in `low` .. `high`, both included; no bool, no 3.0.

    Example:
        >>> integer(1, 8)(3, "recipe.json: seed")
        3
    """

    def check(value: Any, at: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not _within(value, low, high):
            raise _wrong(at, value, f"a whole number{_range(low, high)}")
        return value

    return check


def number(low: float | None = None, high: float | None = None, *, finite: bool = True) -> Check:
    """A number in `low` .. `high`, both included, as a float; NaN never, an infinity only with `finite=False`."""

    def check(value: Any, at: str) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if good and isinstance(value, int) and abs(value) > 1 << 1023:
            good = False  # beyond the largest float
        if not good or math.isnan(value) or (finite and math.isinf(value)) or not _within(value, low, high):
            raise _wrong(at, value, f"a {'finite ' if finite else ''}number{_range(low, high)}")
        return float(value)

    return check


def boolean() -> Check:
    """True or False."""

    def check(value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise _wrong(at, value, "true or false")
        return value

    return check


def text(max_length: int = MAX_TEXT, *, pattern: str | None = None, what: str | None = None) -> Check:
    """A string of at most `max_length` characters.

    Args:
        max_length: In characters.
        pattern: A regular expression that the whole string must match.
        what: The pattern in words, for the message.
    """
    compiled = None if pattern is None else re.compile(pattern, re.DOTALL)

    def check(value: Any, at: str) -> str:
        if not isinstance(value, str) or len(value) > max_length:
            raise _wrong(at, value, f"a text of at most {max_length} characters")
        if compiled is not None and compiled.fullmatch(value) is None:
            raise _wrong(at, value, what or f"a text like {pattern}")
        return value

    return check


def one_of(*allowed: Any) -> Check:
    """One of these values, of the same type (True is not 1)."""

    def check(value: Any, at: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise _wrong(at, value, "one of " + ", ".join(map(repr, allowed)))
        return value

    return check


def optional(inner: Check) -> Check:
    """None (JSON's null), or what `inner` allows."""

    def check(value: Any, at: str) -> Any:
        return None if value is None else inner(value, at)

    return check


def either(*inner: Check) -> Check:
    """What any of several checks allows, first match first; the message is that of the last."""

    def check(value: Any, at: str) -> Any:
        for one in inner[:-1]:
            try:
                return one(value, at)
            except ValueError:
                continue
        return inner[-1](value, at)

    return check


def listing(inner: Check, low: int = 0, high: int = MAX_ITEMS, *, distinct: bool = False) -> Check:
    """A list of `low` to `high` items, each as `inner` allows.

    Args:
        inner: The check of each item.
        low: Fewest items.
        high: Most items.
        distinct: Whether an item that stands twice is refused (items must be hashable).
    """

    def check(value: Any, at: str) -> list[Any]:
        if not isinstance(value, (list, tuple)) or not low <= len(value) <= high:
            count = f"{low}" if low == high else f"{low} to {high}"
            raise _wrong(at, value, f"a list of {count} items")
        items = [inner(item, f"{at}[{index}]") for index, item in enumerate(value)]
        if distinct and len(set(items)) != len(items):
            raise _wrong(at, value, "a list in which nothing stands twice")
        return items

    return check


def mapping(inner: Check, low: int = 0, high: int = 100_000, *, keys: Check | None = None) -> Check:
    """An object of `low` to `high` entries with names of the file's own choice, each value as `inner` allows."""
    name = text(1000) if keys is None else keys

    def check(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not low <= len(value) <= high:
            raise _wrong(at, value, f"an object ({{...}}) of {low} to {high} entries")
        return {name(key, f"a name in {at}"): inner(item, _below(at, key)) for key, item in value.items()}

    return check


def record(required: Mapping[str, Check], extra: Mapping[str, Check] | None = None, *, others: bool = False) -> Check:
    """An object with known fields.

    Args:
        required: Fields that must be there.
        extra: Fields that may be missing; they are then missing in the result too.
        others: Whether fields of other names are allowed, and left out of the result.

    Example:
        >>> record({"seed": integer(0)})({"seed": -1}, "recipe.json")
        Traceback (most recent call last):
        ...
        ValueError: recipe.json: seed is -1; allowed is a whole number from 0.
    """
    known = {**required, **(extra or {})}

    def check(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _wrong(at, value, "an object ({...})")
        missing = [name for name in required if name not in value]
        if missing:
            raise ValueError(f"{at} has no {', '.join(map(repr, missing))}.")
        strange = [] if others else [name for name in value if name not in known]
        if strange:
            raise ValueError(
                f"{at} has {', '.join(shown(name) for name in strange[:5])}, which this version does not know; known "
                f"are {', '.join(known)}. Upgrade diffusers-repr, or correct the file."
            )
        return {name: one(value[name], _below(at, name)) for name, one in known.items() if name in value}

    return check


def anything(max_depth: int = 20, max_items: int = MAX_ITEMS, *, finite: bool = False) -> Check:
    """Any plain JSON value of bounded depth and size: for what is only shown or compared, never acted on.

    Args:
        max_depth: Lists and objects inside one another.
        max_items: Values in all.
        finite: Whether NaN and infinities, which our own files never hold, are refused.
    """

    def check(value: Any, at: str) -> Any:
        left = [max_items]

        def walk(item: Any, depth: int, place: str) -> None:
            left[0] -= 1
            if depth > max_depth or left[0] < 0:
                raise ValueError(f"{at} is nested deeper than {max_depth} or has more than {max_items} values.")
            if isinstance(item, Mapping):
                for key, inner in item.items():
                    walk(key, depth + 1, place)
                    walk(inner, depth + 1, _below(at, key) if depth == 0 else place)
            elif isinstance(item, (list, tuple)):
                for inner in item:
                    walk(inner, depth + 1, place)
            elif isinstance(item, str):
                text()(item, place)
            elif finite and isinstance(item, float):
                number()(item, place)
            elif item is not None and not isinstance(item, (bool, int, float)):
                raise _wrong(place, item, "what JSON can hold")

        walk(value, 0, at)
        return value

    return check


def digest() -> Check:
    """A hash in lower-case hexadecimal digits."""
    return text(128, pattern=_HASH.pattern, what="a hash of 8 to 128 hexadecimal digits")


def file_name(*suffixes: str) -> Check:
    """A relative file path that stays inside its folder, in POSIX form: no `..`, nothing absolute, no drive.

    Args:
        *suffixes: Allowed endings (`".safetensors"`); none given: any.

    Example:
        >>> file_name(".json")("data/a.json", "manifest.json: file")
        'data/a.json'
    """

    def check(value: Any, at: str) -> str:
        allowed = "a relative path inside the folder, without '..', '\\' or a drive"
        allowed += f", that ends in {' or '.join(suffixes)}" if suffixes else ""
        good = isinstance(value, str) and 0 < len(value) <= 1000 and "\\" not in value and printable(value) == value
        if good:
            path = PurePosixPath(value)
            good = not path.is_absolute() and not PureWindowsPath(value).drive and value == path.as_posix()
            good = good and ".." not in path.parts and value != "." and (not suffixes or value.endswith(suffixes))
        if not good:
            raise _wrong(at, value, allowed)
        return value

    return check


def inside(folder: str | os.PathLike[str], name: str, at: str = "a file name") -> Path:
    """The file `name` of a folder, refused if the name or a link in it leads out of the folder.

    Links of the Hub's cache stay allowed: they lead from `snapshots/<commit>`, and folders in it, to `blobs` of the
    same repository.

    Args:
        folder: The folder that was opened.
        name: As `file_name` allows.
        at: Where the name stands, for the message.

    Raises:
        ValueError: If the file lies outside.
    """
    name = file_name()(name, at)
    root, path = Path(folder), Path(folder) / name
    resolved, own = path.resolve(), root.resolve()
    snapshots = next((part.parent for part in (own, *own.parents) if part.parent.name == "snapshots"), None)
    allowed = [own] if snapshots is None else [own, snapshots.parent / "blobs"]
    if not any(resolved == place or place in resolved.parents for place in allowed):
        raise ValueError(
            f"{at}: {shown(name)} of {str(folder)!r} is a link that leads out of the folder; it is not followed. "
            "Copy the file to its place."
        )
    return path


def printable(value: str) -> str:
    r"""A text of others for the screen or a card: control characters, also those that turn writing round, as `\x..`.

    Line breaks and tabs too: one text is one line.

    Example:
        >>> print(printable("cat\x1b[2J\nno"))
        cat\x1b[2J\nno
    """
    return "".join(_escaped(c) if _steers(c) else c for c in value)


def shown(value: Any, width: int = _SHOWN) -> str:
    """`repr` for a message: printable, and cut to `width` characters."""
    if isinstance(value, str):
        value = value[: width + 1]
    elif isinstance(value, (Mapping, list, tuple)):
        kind = "object" if isinstance(value, Mapping) else "list"
        return f"{'an' if kind == 'object' else 'a'} {kind} of {len(value)}"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    elif value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    said = printable(repr(value))
    return said if len(said) <= width else said[: width - 3] + "..."


def _steers(character: str) -> bool:
    """Whether a character moves or hides others; joiners are part of words and pictures."""
    category = unicodedata.category(character)
    return (category[0] == "C" or category in ("Zl", "Zp")) and character not in "\u200c\u200d"


def _escaped(character: str) -> str:
    simple = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    code = ord(character)
    return simple.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{{{code:x}}}")


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" up to {high}"
    return f" from {low}" + ("" if high is None else f" to {high}")


def _below(at: str, name: Any) -> str:
    """The place of a field: `probe.json: base` -> `probe.json: base.features`."""
    name = printable(str(name))[:_SHOWN]
    return f"{at}.{name}" if ": " in at else f"{at}: {name}"


def _wrong(at: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{at} is {shown(value)}; allowed is {allowed}.")
