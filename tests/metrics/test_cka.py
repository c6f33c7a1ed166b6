import pytest
import torch

from diffusers_repr.metrics import cka
from tests.metrics import oracles


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(n, d, e):
    a, b = randn(n, d, seed=1), randn(n, e, seed=2)
    b[:, : min(d, e)] += a[:, : min(d, e)]
    return a + 3, b - 5  # with a mean, which must not matter


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("n", "d", "e"), [(4, 2, 3), (50, 6, 9), (12, 40, 30), (30, 200, 3)])
def test_equals_explicit_kernel_matrices(n, d, e, unbiased):
    a, b = related(n, d, e)
    expected = oracles.cka(a, b, unbiased)
    assert cka(a, b, unbiased=unbiased) == pytest.approx(expected, abs=1e-10)  # narrow: A'B; wide: kernel matrices
    for rows in (1, 5, n, 1000):
        assert cka(a, b, unbiased=unbiased, block_rows=rows) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_invariances(unbiased):
    a, b = (x.double() for x in related(60, 8, 8))
    rotation = torch.linalg.qr(randn(8, 8, seed=3, dtype=torch.float64))[0]
    assert cka(a, -2 * a @ rotation + 1, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
    assert cka(a @ rotation, b, unbiased=unbiased) == pytest.approx(cka(b, a, unbiased=unbiased), abs=1e-12)
    assert cka(a[:, [0]].expand(-1, 8) * a, b, unbiased=unbiased) < 0.99


def test_only_the_biased_one_rewards_width():
    draws = [(randn(40, 100, seed=2 * s), randn(40, 100, seed=2 * s + 1)) for s in range(20)]
    mean = sum(cka(a, b) for a, b in draws) / 20
    biased = sum(cka(a, b, unbiased=False) for a, b in draws) / 20
    assert abs(mean) < 0.05
    assert biased > 0.5


def test_the_mean_costs_no_digits():
    a, b = related(100, 5, 5)
    shifted = cka(a.double() + 1e6, b.double() - 1e6)
    assert shifted == pytest.approx(cka(a.double(), b.double()), abs=1e-8)


def test_mixed_precision_and_large_sets():
    a, b = related(2100, 4, 4)
    assert cka(a, b.double()) == pytest.approx(cka(a, b), abs=1e-5)
    assert cka(a, b) == pytest.approx(cka(a, b, dtype=torch.float64), abs=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        (randn(3, 2), randn(3, 2), {}, "at least 4"),
        (randn(1, 2), randn(1, 2), {"unbiased": False}, "at least 2"),
        (randn(5, 2), randn(6, 2), {}, "row i of both"),
        (randn(5, 2), torch.full((5, 2), 3.0), {}, "rows of B are alike"),
        (torch.full((3000, 2), 0.1), randn(3000, 2), {}, "rows of A are alike"),
        (randn(5, 2), torch.tensor([[0.0, torch.inf]] * 5), {}, "not finite"),
        (randn(5, 2), randn(5, 2), {"block_rows": 1.5}, "block_rows"),
    ],
)
def test_bad_input(a, b, settings, message):
    with pytest.raises(ValueError, match=message):
        cka(a, b, **settings)
