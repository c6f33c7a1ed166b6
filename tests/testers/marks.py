"""Marks of long products: a few fast cases, the rest by `make test-slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of `parametrize` that `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, all but `fast` marked slow.

    Raises:
        ValueError: If a fast one is no case.
    """
    cases = list(cases)
    if missing := [case for case in fast if case not in cases]:
        raise ValueError(f"{missing} are no cases.")
    return [case if case in fast else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
