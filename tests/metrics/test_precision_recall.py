import pytest
import torch

from diffusers_repr.metrics import precision_recall
from tests.metrics import oracles


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("block_rows", [None, 1, 7])
def test_equals_the_loop_over_pairs(k, block_rows):
    real, generated = randn(31, 3, seed=1) + 4, 0.6 * randn(23, 3, seed=2) + 4.5
    found = precision_recall(real, generated, k, block_rows=block_rows)
    assert found == pytest.approx(oracles.precision_recall(real, generated, k))
    assert 0 < found.recall < 1 or k == 9


def test_what_they_are():
    """A generator of one of two modes is precise and lacks recall; one of noise the other way round."""
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    real = torch.cat([modes[0] + randn(50, 2, seed=1), modes[1] + randn(50, 2, seed=2)])
    one_mode = randn(100, 2, seed=3)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.06)
    assert precision_recall(one_mode, real) == (pytest.approx(recall), pytest.approx(precision))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e4) == (0, 0)


def test_the_border_belongs_to_the_ball():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert precision_recall(real, torch.tensor([[-1.0], [-1.5], [11.0], [11.5]]), k=1).precision == 0.5


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (randn(9, 2), randn(5, 2), 5, "from 1 to 4; got 5"),
        (randn(9, 2), randn(5, 2), 0, "got 0"),
        (randn(9, 2), randn(5, 3), 3, "use one encoder"),
        (randn(9, 2), randn(1, 2), 1, "generated has 1 rows"),
        (randn(9, 2) * torch.inf, randn(5, 2), 3, "not finite"),
    ],
)
def test_bad_input(x, y, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(x, y, k)
