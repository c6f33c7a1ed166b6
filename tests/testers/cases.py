"""Long products of cases: a few in every run, all of them under `make test-slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for `parametrize`; all but those in `fast` are marked slow."""
    cases = list(cases)
    assert all(case in cases for case in fast), "no such case"
    return [case if case in fast else _slow(case) for case in cases]


def pairs(first: Iterable[Any], second: Iterable[Any], *fast: tuple[Any, Any]) -> list[Any]:
    """As `some`, of all pairs."""
    return some(itertools.product(first, second), *fast)


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
