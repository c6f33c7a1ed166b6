"""Many threads on one model, switched as often as Python can."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Results of functions that start at one moment, a thread each; the first error is raised."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait()
        return work()

    with switching(), ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


def in_thread(work: Callable[[], Any]) -> Any:
    """Result of a function in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def equal(found: Any, expected: Any) -> bool:
    """Bit-equal, in lists, tuples and dicts."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    return len(found) == len(expected) and all(map(equal, found, expected))
