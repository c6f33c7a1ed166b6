"""Features of single pixels against those of all pixels, resized and indexed."""

import pytest
import torch
from torch.nn import functional

from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.sampled_maps import SampledMaps, feature_maps
from diffusers_repr.noise import NoiseLevel

SIZE = (12, 20)
GRIDS = [(3, 5), (3, 5), (6, 10), (12, 20), (5, 7), (24, 20)]  # smaller, of another shape, as large, larger
CHANNELS = [4, 2, 3, 2, 3, 1]


def maps(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, c, *grid, generator=generator) for c, grid in zip(CHANNELS, GRIDS, strict=True)]


def every_pixel(rows):
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(SIZE[0]), torch.arange(SIZE[1]))
    return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(1))]


def filled(parts, dtype="float32"):
    held = SampledMaps(SIZE, dtype)
    for part in parts:
        held.add(part)
    return held


def test_sampled_pixels_are_those_of_the_resized_maps():
    first, second = maps(2), maps(1, seed=5)
    places = every_pixel(3)
    found = filled([first, second]).sample(*places.unbind(1))
    dense = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    resized = torch.cat([functional.interpolate(m, SIZE, mode="bilinear") for m in dense], 1)
    row, y, x = places.unbind(1)
    torch.testing.assert_close(found, resized[row, :, y, x], atol=1e-6, rtol=0)
    centres = torch.stack([2 * (x + 0.5) / SIZE[1] - 1, 2 * (y + 0.5) / SIZE[0] - 1], -1)
    for image in range(3):
        mine = row == image
        grid = centres[mine][None, None]
        sampled = [functional.grid_sample(m[[image]], grid, padding_mode="border", align_corners=False) for m in dense]
        torch.testing.assert_close(found[mine], torch.cat(sampled, 1)[0, :, 0].T, atol=3e-6, rtol=0)


def test_half_the_memory():
    whole, half = filled([maps(2)]), filled([maps(2)], "float16")
    assert half.nbytes * 2 == whole.nbytes == 4 * sum(m.numel() for m in maps(2))
    assert half.channels == sum(CHANNELS)
    places = every_pixel(2)[:50].unbind(1)
    torch.testing.assert_close(half.sample(*places), whole.sample(*places), atol=3e-3, rtol=0)
    assert half.sample(*places).dtype == torch.float32
    with pytest.raises(OverflowError, match="too large for float16"):
        filled([[torch.full((1, 1, 2, 2), 1e6)]], "float16")
    with pytest.raises(ValueError, match="float32 or float16"):
        SampledMaps(SIZE, "bfloat16")


def test_other_maps_are_refused():
    held = filled([maps(1)])
    for wrong in (maps(1)[:-1], [m[:, :, :2] for m in maps(1)], [m.repeat(1, 2, 1, 1) for m in maps(1)]):
        with pytest.raises(ValueError, match="do not go with those before"):
            held.add(wrong)


def test_levels_come_before_layers():
    features = {"a": torch.randn(2, 3, 4, 2, 2), "b": torch.randn(2, 3, 6, 5)}  # a map; tokens of 2 x 3
    output = FeatureOutput(features, [NoiseLevel(timestep=1), NoiseLevel(timestep=2)], {"b": ((2, 3), 0)})
    found = feature_maps(output, ["b", "a"])
    assert [tuple(m.shape) for m in found] == [(3, 5, 2, 3), (3, 4, 2, 2)] * 2
    for level in range(2):
        assert torch.equal(found[2 * level + 1], features["a"][level])
        assert torch.equal(found[2 * level].flatten(2).mT, features["b"][level])
