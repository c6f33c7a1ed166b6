"""Poolings of maps and tokens, against the plain formulas."""

import pytest
import torch

from diffusers_repr.features.pooling import check_pooling, concatenate, is_linear, pool, pooled_size, tokens_to_map


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_mean_and_max_of_a_map():
    x = values(2, 3, 4, 6)
    torch.testing.assert_close(pool(x, "mean"), x.sum((2, 3)) / 24)
    assert torch.equal(pool(x, "max"), x.flatten(2).max(2).values)
    assert pool(x, None) is x


def test_adaptive_cells_lie_channel_by_channel():
    x = values(2, 3, 4, 6)
    pooled = pool(x, "adaptive:2").view(2, 3, 2, 2)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(pooled[:, :, i, j], x[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((2, 3)))
    torch.testing.assert_close(pooled.mean((2, 3)), pool(x, "mean"))  # cells of equal size
    torch.testing.assert_close(pool(x, "adaptive:1"), pool(x, "mean"))
    assert pool(x, "adaptive:3").shape == (2, 3 * pooled_size("adaptive:3"))


def test_tokens_are_pooled_as_the_map_they_are():
    x = values(2, 5, 4, 6)
    tokens = x.flatten(2).transpose(1, 2)
    text = values(2, 7, 5)
    for pooling in ("mean", "max", "adaptive:2"):
        torch.testing.assert_close(pool(tokens, pooling, ((4, 6), 0)), pool(x, pooling))
        torch.testing.assert_close(pool(torch.cat([text, tokens], 1), pooling, ((4, 6), 7)), pool(x, pooling))
    assert torch.equal(tokens_to_map(tokens, (4, 6)), x)


def test_the_mean_does_not_see_where_things_lie():
    x = values(1, 3, 4, 4)
    shuffled = x.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))].view_as(x)
    torch.testing.assert_close(pool(shuffled, "mean"), pool(x, "mean"))
    assert not torch.allclose(pool(shuffled, "adaptive:2"), pool(x, "adaptive:2"))


def test_half_precision_is_summed_wide():
    x = torch.full((1, 1, 64, 64), 1.001, dtype=torch.bfloat16)
    assert pool(x, "mean").dtype is torch.float32
    assert pool(x, "mean").item() == pytest.approx(float(x[0, 0, 0, 0]), rel=1e-6)


def test_vectors_stay():
    assert torch.equal(pool(values(2, 3), "mean"), values(2, 3))
    assert concatenate([values(2, 3), values(2, 4)]).shape == (2, 7)


def test_properties():
    assert [is_linear(p) for p in (None, "mean", "adaptive:4", "max")] == [True, True, True, False]
    assert [pooled_size(p) for p in ("mean", "max", "adaptive:4")] == [1, 1, 16]


@pytest.mark.parametrize(
    "pooling", ["gap", "adaptive", "adaptive:", "adaptive:0", "adaptive:-1", "adaptive:2x", "", 2]
)
def test_unknown_poolings(pooling):
    with pytest.raises(ValueError, match="Unknown pooling.*'adaptive:P'"):
        check_pooling(pooling)


def test_what_cannot_be_pooled():
    with pytest.raises(ValueError, match="needs their grid"):
        pool(values(2, 7, 3), "mean")
    with pytest.raises(ValueError, match="do not fit"):
        pool(values(2, 7, 3), "mean", ((2, 4), 0))
    with pytest.raises(ValueError, match="do not fit"):
        tokens_to_map(values(2, 7, 3), (2, 3))
    with pytest.raises(ValueError, match="Cannot pool"):
        pool(values(2, 3, 4, 5, 6, 2), "mean")
    with pytest.raises(ValueError, match="leaves maps"):
        pooled_size(None)


def test_maps_stay_maps():
    """`map:P` averages over cells where a side has more than P; a smaller side stays, tokens become a map."""
    x = values(2, 5, 4, 6)
    assert torch.equal(pool(x, "map:9"), x)
    found = pool(x, "map:3")
    assert found.shape == (2, 5, 3, 3)
    torch.testing.assert_close(pool(x, "map:2"), pool(x, "adaptive:2").view(2, 5, 2, 2))
    torch.testing.assert_close(pool(values(2, 3, 2, 6), "map:3"), values(2, 3, 2, 6).unflatten(3, (3, 2)).mean(4))
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(pool(tokens, "map:3", ((4, 6), 0)), found)
    with pytest.raises(ValueError, match="pooling='map:3' leaves maps"):
        pooled_size("map:3")
