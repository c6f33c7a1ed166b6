import pytest
import torch

from diffusers_repr.metrics import cka, cknna, compare_graphs, neighbour_graph
from diffusers_repr.metrics.checks import clamp_outliers
from diffusers_repr.sweep import CKNNA
from tests.metrics import oracles


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 3), (17, 2), (40, 10), (40, 39)])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_equals_explicit_masks_and_matrices(n, k, strength):
    a = randn(n, 6, seed=1)
    b = torch.cat([strength * a, randn(n, 3, seed=2)], 1)
    expected = oracles.cknna(a, b, k), oracles.cknna(b, a, k)
    assert cknna(a, b, k, symmetric=False) == pytest.approx(expected[0], abs=1e-12)
    assert cknna(b, a, k, symmetric=False) == pytest.approx(expected[1], abs=1e-12)
    assert cknna(a, b, k) == pytest.approx(sum(expected) / 2, abs=1e-12)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (24, 5), (24, 24)])
@pytest.mark.parametrize("normalize_rows", [True, False])
def test_the_biased_estimator_equals_loops(n, k, normalize_rows):
    """Each row is among its own neighbours where it is near itself, as in the code of Huh et al."""
    a, b = randn(n, 6, seed=1), randn(n, 9, seed=2)
    b[:, :6] += 0.5 * a
    b[0] /= 50  # inner products of a short row: it is not near itself
    settings = {"unbiased": False, "normalize_rows": normalize_rows}
    wanted = oracles.cknna(a, b, k, **settings)
    assert cknna(a, b, k, **settings) == pytest.approx(wanted, abs=1e-12)
    assert cknna(b, a, k, symmetric=False, **settings) == pytest.approx(wanted, abs=1e-12)
    assert cknna(a, a, k, **settings) == pytest.approx(1, abs=1e-12)
    if k == n and normalize_rows:
        assert wanted == pytest.approx(cka(a, b, unbiased=False, normalize_rows=True), abs=1e-12)


def test_published_numbers_to_the_digit():
    """`eps` is added to the root of the product; on raw rows the scale decides how much it does."""
    a, b = randn(40, 6, seed=1), randn(40, 9, seed=2)
    b[:, :6] += a
    for settings in ({"eps": 1e-6}, {"eps": 0.01}, {"eps": 1e-6, "normalize_rows": False}):
        wanted = oracles.cknna(a, b, 10, **settings)
        assert cknna(a, b, 10, symmetric=False, **settings) == pytest.approx(wanted, abs=1e-12)
    lowered = 1 - cknna(a, a, 10, eps=1e-3)
    assert 0.01 < lowered < 0.2
    assert cknna(1000 * a, 1000 * a, 10, eps=1e-3) == pytest.approx(1 - lowered, abs=1e-9)
    assert cknna(1000 * a, 1000 * a, 10, eps=1e-3, normalize_rows=False) == pytest.approx(1, abs=1e-6)
    assert CKNNA("cknna").describe() == {"k": 10, "symmetric": True, "clamp_quantile": None}
    assert CKNNA("cknna", eps=1e-6, unbiased=False).describe().items() >= {"eps": 1e-6, "unbiased": False}.items()


@pytest.mark.parametrize("n", [64, 256, 1000, 2500])
def test_a_representation_agrees_with_itself_whatever_n(n):
    a = randn(n, 16)
    assert cknna(a, a) == pytest.approx(1, abs=1e-6 if n > 2000 else 1e-12)
    assert cknna(a, 7 * a) == pytest.approx(1, abs=1e-6 if n > 2000 else 1e-12)


def test_all_neighbours_is_unbiased_cka():
    a, b = randn(300, 8, seed=1), randn(300, 5, seed=2)
    b[:, :4] += a[:, :4]
    assert cknna(a, b, 299) == pytest.approx(cka(a, b, normalize_rows=True), abs=1e-10)


@pytest.mark.parametrize(
    ("n", "k", "least", "most"),
    [(16, 2, 1e-3, 3e-2), (64, 10, 5e-5, 3e-3), (1000, 10, 0, 1e-5), (200, 150, 5e-5, 2e-3)],
)
def test_the_order_matters_most_of_few_rows_or_many_neighbours(n, k, least, most):
    """What docs/metrics.md says of it."""
    away = []
    for seed in range(4):
        a = randn(n, 32, seed=seed)
        b = 0.8 * a + randn(n, 32, seed=100 + seed)
        away.append(abs(cknna(a, b, k, symmetric=False) - cknna(b, a, k, symmetric=False)))
    assert least <= max(away) <= most


def test_the_order_matters_a_little_and_the_mean_does_not():
    a, b = randn(500, 32, seed=1), randn(500, 32, seed=2)
    b = a + 0.7 * b
    forth, back = cknna(a, b, symmetric=False), cknna(b, a, symmetric=False)
    assert 0 < abs(forth - back) < 1e-3
    assert cknna(a, b) == pytest.approx(cknna(b, a), abs=1e-13)
    assert cknna(a, b) == pytest.approx((forth + back) / 2, abs=1e-13)


def test_response_to_noise():
    """Published values of the reference with N=500, D=32, k=10, within the spread over draws."""
    a, noise = randn(500, 32, seed=3), randn(500, 32, seed=4)
    scores = [cknna(a, a + s * noise) for s in (0, 0.5, 1, 2, 4)]
    assert scores == pytest.approx([1, 0.428, 0.152, 0.044, 0.02], abs=0.02)
    assert scores == sorted(scores, reverse=True)
    assert cknna(a, a[torch.randperm(500, generator=torch.Generator().manual_seed(0))]) == pytest.approx(
        0.02, abs=0.01
    )


def test_unrelated_features_score_less_with_more_of_them():
    scores = [cknna(randn(n, 32, seed=1), randn(n, 32, seed=2)) for n in (64, 256, 1000, 4000)]
    assert scores == pytest.approx([0.147, 0.034, 0.0063, 0.0022], rel=0.6)


def test_rotation_scale_and_row_length_do_not_matter():
    a, b = randn(120, 12, seed=1, dtype=torch.float64), randn(120, 9, seed=2, dtype=torch.float64)
    b[:, :9] += a[:, :9]
    rotation = torch.linalg.qr(randn(12, 12, seed=3, dtype=torch.float64))[0]
    lengths = randn(120, 1, seed=4, dtype=torch.float64).exp()
    assert cknna(3.5 * a @ rotation, b * lengths) == pytest.approx(cknna(a, b), abs=1e-12)


@pytest.mark.parametrize("block_rows", [1, 7, 119, 120, 1000])
def test_blocks_equal_the_whole(block_rows):
    a, b = randn(120, 12, seed=1), randn(120, 9, seed=2)
    assert cknna(a, b, block_rows=block_rows) == pytest.approx(cknna(a, b), abs=1e-12)


def test_float32_is_close_and_is_what_large_sets_use():
    a = randn(400, 32, seed=1)
    b = a + randn(400, 32, seed=2)
    assert cknna(a, b, dtype=torch.float32) == pytest.approx(cknna(a, b), abs=1e-4)
    large = randn(2100, 8, seed=1)
    assert cknna(large, large.flip(0)) == pytest.approx(cknna(large, large.flip(0), dtype=torch.float64), abs=1e-4)
    assert cknna(large, large.flip(0)) == cknna(large, large.flip(0), dtype=torch.float32)


def test_of_equally_near_rows_the_first_counts():
    a = torch.eye(3).repeat(5, 1)  # every row five times; k=2 of four equal ones
    graph = neighbour_graph(a, 2)
    assert graph.columns.tolist()[:3] == [[3, 6], [4, 7], [5, 8]]
    assert graph.columns.tolist()[3] == [0, 6]
    assert torch.equal(graph.columns, neighbour_graph(a, 2, block_rows=4).columns)
    mask = oracles.masks(a @ a.T, 2)
    assert torch.equal(mask.nonzero()[:, 1].view(-1, 2), graph.columns)


def test_a_graph_is_made_once_for_many_comparisons():
    a, b = randn(50, 4, seed=1), randn(50, 6, seed=2)
    assert compare_graphs(neighbour_graph(a, 5), neighbour_graph(b, 5)) == cknna(a, b, 5)
    with pytest.raises(ValueError, match="both must be equal"):
        compare_graphs(neighbour_graph(a, 5), neighbour_graph(b, 6))
    with pytest.raises(ValueError, match="for the unbiased HSIC and the other is not"):
        compare_graphs(neighbour_graph(a, 5), neighbour_graph(b, 5, unbiased=False))


def test_outliers_are_clamped_at_the_quantile_of_sizes():
    values = torch.arange(-50.0, 50.0).view(10, 10)
    sizes = sorted(abs(v) for v in values.flatten().tolist())
    limit = sizes[int(0.95 * 100)]
    assert torch.equal(clamp_outliers(values, 0.95), values.clamp(-limit, limit))
    assert torch.equal(clamp_outliers(values, 1.0), values)
    a, b = randn(60, 8, seed=1), randn(60, 8, seed=1)
    b[:, 0] = 1000 * randn(60, seed=2)  # one channel that drowns the others
    clamped = cknna(a, b, clamp_quantile=0.8)
    assert clamped == cknna(clamp_outliers(a.double(), 0.8), clamp_outliers(b.double(), 0.8))
    assert cknna(a, b) < clamped - 0.05


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        (randn(3, 2), randn(3, 2), {"k": 1}, "A has 3 rows; at least 4"),
        (randn(9, 2), randn(8, 2), {"k": 2}, "A has 9 rows and B has 8"),
        (randn(9, 2), randn(9, 2), {"k": 9}, "k must be a whole number from 1 to 8; got 9"),
        (randn(9, 2), randn(9, 2), {}, "k must be a whole number from 1 to 8; got 10"),
        (randn(9, 2), randn(9, 2), {"k": 0}, "got 0"),
        (randn(9, 2), randn(9, 2), {"k": 2.5}, "got 2.5"),
        (randn(9, 2), randn(9, 2, 3), {"k": 2}, "B must be a matrix"),
        (randn(9, 2), torch.full((9, 2), torch.nan), {"k": 2}, "9 of 9 rows of B are not finite"),
        (randn(9, 2), torch.ones(9, 2), {"k": 2}, "are alike"),
        (randn(9, 2), torch.arange(1.0, 10.0)[:, None], {"k": 2}, "scaled to length 1, are alike"),
        (randn(9, 2), randn(9, 2), {"k": 10, "unbiased": False}, "k must be a whole number from 1 to 9; got 10"),
        (randn(9, 2), randn(9, 2), {"k": 2, "eps": -1e-6}, "eps must not be negative"),
        (randn(9, 2), torch.ones(9, 2), {"k": 2, "normalize_rows": False}, "rows of the features are alike"),
        (randn(9, 2), randn(9, 2), {"k": 2, "clamp_quantile": 0.0}, "quantile"),
        (randn(9, 2), randn(9, 2), {"k": 2, "block_rows": 0}, "block_rows"),
        (randn(9, 2), randn(9, 2), {"k": 2, "dtype": torch.float16}, "dtype"),
    ],
)
def test_bad_input(a, b, settings, message):
    with pytest.raises(ValueError, match=message):
        cknna(a, b, **settings)


def test_bad_type():
    with pytest.raises(TypeError, match="B must be a tensor"):
        cknna(randn(9, 2), [[1.0]] * 9, 2)


@pytest.mark.gpu
def test_on_a_gpu():
    a, b = randn(300, 16, seed=1), randn(300, 16, seed=2)
    b += a
    assert cknna(a.cuda(), b.cuda()) == pytest.approx(cknna(a, b), abs=1e-9)
    assert cka(a.cuda(), b) == pytest.approx(cka(a, b), abs=1e-9)
