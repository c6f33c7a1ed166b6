"""Long products of cases: a few in every run, all of them under `make test-slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for `parametrize`; all but those in `fast` are marked slow."""
    cases = list(cases)
    assert all(case in cases for case in fast), "no such case"
    return [case if case in fast else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]


def pairs(first: Iterable[Any], second: Iterable[Any], *fast: tuple[Any, Any]) -> list[Any]:
    """As `some`, of all pairs."""
    return some(itertools.product(first, second), *fast)


def rotating(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """As `pairs`; fast are each of the first once and each of the second in turn."""
    first, second = list(first), list(second)
    return pairs(first, second, *((one, second[at % len(second)]) for at, one in enumerate(first)))


def slow(*values: Any) -> Any:
    """A case of `parametrize` that `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
