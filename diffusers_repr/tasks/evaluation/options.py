"""Sections of a recipe against the function that takes them: its keyword arguments are the keys, hints the types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from diffusers_repr.config.recipe import check_keys, check_of
from diffusers_repr.hub import schema


def keywords(function: Callable[..., Any], without: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a function, those apart that a recipe does not give.

    Args:
        function: Any.
        without: Names to leave out.
    """
    found = inspect.signature(function).parameters.values()
    return {one.name: one for one in found if one.kind is one.KEYWORD_ONLY and one.name not in without}


def takes_settings(function: Callable[..., Any]) -> bool:
    """Whether a function takes further settings by name."""
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())


def checked(
    place: str, given: Mapping[str, Any], function: Callable[..., Any], without: Collection[str] = ()
) -> dict[str, Any]:
    """A section as arguments of a function; keys it does not take, values of another type, and a missing key raise.

    Args:
        place: Of the section, for messages: `digits.yaml: source`.
        given: The section.
        function: That takes it.
        without: Arguments that a recipe does not give.

    Raises:
        ValueError: Names the key.
    """
    known = keywords(function, without)
    check_keys(place, given, known)
    hints = get_type_hints(function)
    found = {}
    for key, value in given.items():
        schema.optional(check_of(hints.get(key, Any)))(value, f"{place}.{key}")
        found[key] = _number(value, hints.get(key, Any))
    missing = [name for name, one in known.items() if one.default is one.empty and name not in given]
    if missing:
        raise ValueError(f"{place} has no {missing[0]!r}, which it needs.")
    return found


def _number(value: Any, hint: Any) -> Any:
    """A number that YAML takes for a text, as 1e-3, where no text may stand."""
    kinds = {hint, *get_args(hint)}
    if isinstance(value, str) and str not in kinds and kinds & {int, float}:
        return float(value) if float in kinds else int(value)
    return value


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Inside, what is raised names the place in the recipe that it is about."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str) and not error.args[0].startswith(place):
            error.args = (f"{place}: {error.args[0]}",)
        raise


__all__ = ["checked", "keywords", "naming", "takes_settings"]
