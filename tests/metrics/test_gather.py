import json

import pytest
import torch

from diffusers_repr.metrics import gather_rows, own_rows
from tests.metrics.two_processes import features, measure


def same(a, b, at=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{at}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6), at
    else:
        assert a == b, at


def test_two_processes_measure_what_one_does(together):
    """23 samples, a prime number: accelerate's loader deals 24, and torchmetrics would add both processes' sums."""
    first, second = together[1]["metrics"]
    one = json.loads(json.dumps(measure(features())))
    same(one, first)
    same(one, second)
    assert one["frechet"] > 0


def test_alone_duplicates_are_dropped_and_the_order_is_the_data_sets():
    values = torch.tensor([[3.0], [0.0], [9.0], [1.0], [2.0], [8.0]])
    index = torch.tensor([3, 0, 3, 1, 2, 0])  # of equal ones the first is kept
    assert gather_rows(values, index, 4).flatten().tolist() == [0, 1, 2, 3]
    assert own_rows(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        ([0, 1, 3], 4, r"places \[2\] are missing"),
        ([0, 1, 2], 2, r"\[2\] are out of range"),
        ([-1, 0, 1], 2, r"\[-1\] are out of range"),
        ([0, 1], 3, "differ in their rows"),
        ([0.0, 1.0, 2.0], 3, "whole numbers"),
        ([0, 1, 2], 0, "count"),
    ],
)
def test_bad_places(index, count, message):
    with pytest.raises(ValueError, match=message):
        gather_rows(torch.zeros(3), torch.tensor(index), count)
