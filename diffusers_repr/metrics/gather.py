"""Rows of several processes put together: every sample once, in the data set's order, whatever the padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.store.processes import process_state


def own_rows(count: int) -> list[int]:
    """Rows of a data set that are this process's own; every row belongs to one process, and none is padded.

    Args:
        count: Rows of the data set.

    Example:
        >>> own_rows(3)
        [0, 1, 2]
    """
    state = process_state()
    return list(range(state.process_index, count, state.num_processes))


def gather_rows(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The rows of all processes, ordered by their place in the data set; the same on every process.

    A distributed sampler repeats samples until every process has as many, and a metric over the repeated ones is
    that of another data set. Here each row says which sample it is, and of equal ones the first is kept. Processes
    may bring unequal numbers of rows, also none.

    Args:
        values: `(n, ...)`, this process's rows.
        index: `(n,)`, place of each in the data set, 0 to `count - 1`.
        count: Rows of the data set.

    Returns:
        `(count, ...)`, on the device of `values`.

    Raises:
        ValueError: On every process, if rows and places differ in number, or if a place is missing or out of range.

    Example:
        >>> gather_rows(torch.tensor([20.0, 0.0, 10.0, 0.0]), torch.tensor([2, 0, 1, 0]), 3)
        tensor([ 0., 10., 20.])
    """
    with failing_together():
        check_whole("count", count, 1)
        _check_index(values, index)
    places, rows = _everyones(values.detach(), index.detach().to(torch.int64))
    order = torch.argsort(places, stable=True)
    places = places[order]
    first = torch.ones_like(places, dtype=torch.bool)
    first[1:] = places[1:] != places[:-1]
    found = places[first]
    if len(found) != count or int(found[0]) != 0 or int(found[-1]) != count - 1:
        outside = found[(found < 0) | (found >= count)].tolist()
        seen = torch.zeros(count, dtype=torch.bool)
        seen[found[(found >= 0) & (found < count)].cpu()] = True
        missing = (~seen).nonzero().flatten().tolist()
        raise ValueError(
            f"Rows of {count} samples were expected; places {missing[:10]} are missing and {outside[:10]} are out of "
            f"range (of {len(missing)} and {len(outside)})."
        )
    return rows[order[first]].to(values.device)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, of one shape, on the device of `values`; with one process the tensor itself.

    Example:
        >>> sum_over_processes(torch.ones(2))
        tensor([1., 1.])
    """
    from accelerate.utils import reduce

    state = process_state()
    if state.num_processes == 1:
        return values
    return reduce(values.to(state.device, copy=True), "sum").to(values.device)


def _check_index(values: Tensor, index: Tensor) -> None:
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"index must be whole numbers (n,); got {tuple(index.shape)} {index.dtype}.")
    if values.ndim < 1 or len(values) != len(index):
        raise ValueError(f"values {tuple(values.shape)} and index {tuple(index.shape)} differ in their rows.")


def _everyones(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    from accelerate.utils import gather, gather_object

    state = process_state()
    if state.num_processes == 1:
        return index.to(values.device), values
    shapes_sent = gather_object([(len(index), tuple(values.shape[1:]), values.dtype)])
    shapes = {(shape, dtype) for rows, shape, dtype in shapes_sent if rows}
    if len(shapes) > 1:
        raise ValueError(f"The processes bring rows of unlike shapes or dtypes: {sorted(map(str, shapes))}.")
    if not shapes:
        raise ValueError("No process brings a row.")
    shape, dtype = shapes.pop()
    most = max(rows for rows, _, _ in shapes_sent)
    padded = torch.zeros(most, *shape, dtype=dtype, device=state.device)
    places = torch.full((most,), -1, dtype=torch.int64, device=state.device)
    if len(index):
        padded[: len(index)], places[: len(index)] = values.to(state.device), index.to(state.device)
    places, padded = gather(places), gather(padded)
    real = torch.cat([torch.arange(most) < rows for rows, _, _ in shapes_sent]).to(places.device)
    return places[real], padded[real]


@contextmanager
def failing_together() -> Iterator[None]:
    """An error inside, on any process, raises on all: else the others would wait for that one.

    The process where it arose raises its own error, the others a RuntimeError that tells it. Every process must come
    by.
    """
    from accelerate.utils import gather_object

    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if process_state().num_processes > 1:
        errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        first = next(((rank, text) for rank, text in enumerate(errors) if text), None)
        if error is None and first is not None:
            raise RuntimeError(f"Process {first[0]} stopped: {first[1]}")
    if error is not None:
        raise error
