"""The order of a run's samples: a function of seed and place, so that a run goes on anywhere without a replay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order `(length,)` int64 in which an epoch shows its samples; read-only.

    The last two are kept: a batch may lie across the end of an epoch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(length)
    order.flags.writeable = False
    return order


def batch_indices(length: int, seed: int, first: int, size: int, stride: int) -> Iterator[list[int]]:
    """Sample n of a run is `permutation(seed, epoch)[n mod length]`, so any place is found without a replay.

    Yields the `size` samples from `first` on, then those from `first + stride` on, without end. With `stride` the
    batch of all ranks and `first` moved by `size` for each rank, the ranks show together what one process would.

    Args:
        length: Samples in the data set.
        seed: Of the order; a whole number from 0.
        first: Place of the first sample in the run.
        size: Samples of one batch.
        stride: From the first sample of a batch to that of the next.

    Raises:
        ValueError: If there is no sample, or `size` or `stride` is not positive.

    Example:
        >>> batches = batch_indices(3, seed=0, first=0, size=3, stride=3)
        >>> sorted(next(batches)) == sorted(next(batches)) == [0, 1, 2]
        True
    """
    return ([index for _, index in batch] for batch in epoch_indices(length, seed, first, size, stride))


def epoch_indices(length: int, seed: int, first: int, size: int, stride: int) -> Iterator[list[tuple[int, int]]]:
    """As `batch_indices`, each index with the epoch it is in: `(epoch, index)`, the first epoch 0.

    Args:
        length: See `batch_indices`; so are the others.
        seed: Of the order.
        first: Place of the first sample.
        size: Samples of one batch.
        stride: Between batches.

    Raises:
        ValueError: As `batch_indices`.
    """
    if length < 1 or size < 1 or stride < 1 or first < 0:
        raise ValueError(
            f"length, size and stride must be at least 1 and first at least 0; got length={length}, size={size}, "
            f"stride={stride}, first={first}."
        )
    return _batches(length, seed, first, size, stride)


def _batches(length: int, seed: int, first: int, size: int, stride: int) -> Iterator[list[tuple[int, int]]]:
    while True:
        places = [divmod(n, length) for n in range(first, first + size)]
        yield [(epoch, int(permutation(seed, epoch, length)[place])) for epoch, place in places]
        first += stride
