"""The order of samples: whole epochs, any number of ranks, any start in no time."""

import time

import numpy as np
import pytest

from diffusers_repr.training.order import batch_indices, permutation


def test_epochs_show_every_sample_once_in_another_order():
    batches = batch_indices(7, seed=3, first=0, size=3, stride=3)
    whole = [index for _ in range(7) for index in next(batches)]
    epochs = [whole[:7], whole[7:14], whole[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = batch_indices(7, seed=4, first=0, size=7, stride=7)
    assert next(other) != epochs[0]


def test_ranks_together_show_what_one_process_shows():
    alone = batch_indices(10, seed=1, first=0, size=6, stride=6)
    ranks = [batch_indices(10, seed=1, first=2 * rank, size=2, stride=6) for rank in range(3)]
    for _ in range(5):
        assert [index for rank in ranks for index in next(rank)] == next(alone)


def test_any_place_equals_a_replay():
    replay = batch_indices(5, seed=0, first=0, size=4, stride=4)
    for step in range(12):
        assert next(batch_indices(5, seed=0, first=4 * step, size=4, stride=4)) == next(replay)


def test_batch_larger_than_the_data():
    assert sorted(next(batch_indices(2, seed=0, first=0, size=6, stride=6))) == [0, 0, 0, 1, 1, 1]


def test_far_into_a_large_set_starts_as_fast_as_at_its_beginning():
    length = 1_000_000
    permutation.cache_clear()
    times = []
    for first in (0, 10**12):
        begin = time.perf_counter()
        batch = next(batch_indices(length, seed=0, first=first, size=8, stride=8))
        times.append(time.perf_counter() - begin)
        assert len(set(batch)) == 8
    assert times[1] < 10 * times[0] + 0.05
    assert times[1] < 2  # a replay of 1e12 places would take days


def test_the_order_cannot_be_changed_by_its_reader():
    order = permutation(0, 0, 4)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
    np.testing.assert_array_equal(np.sort(order), np.arange(4))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"size": 0}, {"stride": 0}, {"first": -1}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        batch_indices(**{"length": 4, "seed": 0, "first": 0, "size": 2, "stride": 2} | wrong)
