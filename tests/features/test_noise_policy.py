"""The four noise policies and the keys they go by."""

import pytest
import torch

from diffusers_repr.features.noise_policy import NoiseSource, image_keys, keyed_generator, pixel_keys

SHAPE = (3, 4, 4)


def test_per_image_depends_on_seed_image_and_member_alone():
    source = NoiseSource("per_image", 0)
    a = source.draw(["x", "y", "x"], [0, 0, 1], SHAPE)
    b = NoiseSource("per_image", 0).draw(["y"], [0], SHAPE)
    assert torch.equal(a[1], b[0])
    assert len({tuple(row.flatten().tolist()) for row in a}) == 3
    assert not torch.equal(NoiseSource("per_image", 1).draw(["y"], [0], SHAPE)[0], b[0])


def test_shared_depends_on_seed_and_member_alone():
    source = NoiseSource("shared", 0)
    a = source.draw(["x", "y", "z"], [0, 0, 1], SHAPE)
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    assert torch.equal(source.draw(["other"], [1], SHAPE)[0], a[2])


def test_fresh_goes_on_and_does_not_see_batches():
    one, two = NoiseSource("fresh", 0), NoiseSource("fresh", 0)
    whole = one.draw(["x"] * 4, [0] * 4, SHAPE)
    parts = torch.cat([two.draw(["x"], [0], SHAPE), two.draw(["x"] * 3, [0] * 3, SHAPE)])
    assert torch.equal(whole, parts)
    assert not torch.equal(one.draw(["x"], [0], SHAPE)[0], whole[0])


def test_clean_draws_nothing():
    assert NoiseSource("clean", 0).draw(["x"], [0], SHAPE) is None


@pytest.mark.parametrize("policy", ["per_image", "shared", "fresh"])
def test_noise_is_standard_normal_and_leaves_the_global_state(policy):
    before = torch.get_rng_state()
    draw = NoiseSource(policy, 7).draw([str(i) for i in range(64)], range(64), (4, 8, 8))
    assert draw.dtype is torch.float32
    assert abs(float(draw.mean())) < 0.03
    assert float(draw.var()) == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(draw.flatten(1)) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.35  # independent rows of 256 numbers
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_are_of_the_pixels():
    pixels = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    keys = pixel_keys(pixels)
    assert keys == image_keys(None, pixels)
    assert len(set(keys)) == 3
    assert pixel_keys(pixels[1:2].double()) == [keys[1]]
    assert pixel_keys(pixels + 1e-6) != keys


def test_ids():
    pixels = torch.zeros(2, *SHAPE)
    assert image_keys(["a", 3], pixels) == ["a", "3"]
    assert image_keys(torch.tensor([5, 6]), pixels) == ["5", "6"]
    assert image_keys((i for i in (1, 2)), pixels) == ["1", "2"]


def test_generators_are_the_same_everywhere():
    """Fixed numbers: a change here changes every stored feature."""
    drawn = torch.randn(2, generator=keyed_generator(0, "cat", 1))
    torch.testing.assert_close(drawn, torch.tensor([1.403421, -1.536473]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a"], ValueError, "1 ids for 2 images"),
        ("ab", TypeError, "one text"),
        ([True, False], TypeError, "text or a whole number"),
        ([1.5, 2], TypeError, "text or a whole number"),
        ([None, "a"], TypeError, "text or a whole number"),
    ],
)
def test_bad_ids(ids, error, message):
    with pytest.raises(error, match=message):
        image_keys(ids, torch.zeros(2, *SHAPE))


def test_bad_settings():
    with pytest.raises(ValueError, match="per_image, shared, fresh, clean"):
        NoiseSource("random", 0)
    for seed in (True, 0.5, "0", None):
        with pytest.raises(TypeError, match="seed must be a whole number"):
            NoiseSource("shared", seed)
