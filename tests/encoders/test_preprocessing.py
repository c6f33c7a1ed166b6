import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_repr.encoders.preprocessing import Statistics, expand_channels, preprocess, statistics_from_processor

GENERATOR = torch.Generator().manual_seed(0)
DEFAULT = Statistics((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 14)


def bicubic_weights(size: int, target: int) -> np.ndarray:
    """(target, size): Keys' kernel with a = -0.75 at half-pixel centres, borders repeated, no antialiasing."""
    a, weights = -0.75, np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, min(max(tap, 0), size - 1)] += w
    return weights


def by_hand(pixels: np.ndarray, size: tuple[int, int], mean, std) -> np.ndarray:
    """In float64, the other way round: standardised first, as REPA's code, and resized by two matrices."""
    unit = (np.asarray(pixels, np.float64) + 1) / 2
    normal = (unit - np.reshape(mean, (1, -1, 1, 1))) / np.reshape(std, (1, -1, 1, 1))
    rows, columns = bicubic_weights(pixels.shape[2], size[0]), bicubic_weights(pixels.shape[3], size[1])
    return rows @ normal @ columns.T


@pytest.mark.parametrize("size", [(8, 12), (14, 6), (20, 30), (5, 12)])
def test_resize_and_standardise_equal_a_float64_loop(size):
    pixels = torch.rand(2, 3, 8, 12, generator=GENERATOR) * 2 - 1
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = preprocess(pixels, size, mean, std)
    assert got.shape == (2, 3, *size)
    np.testing.assert_allclose(got.numpy(), by_hand(pixels.numpy(), size, mean, std), atol=2e-5)


def test_half_precision_pixels_are_prepared_in_float32():
    pixels = (torch.rand(1, 3, 8, 8, generator=GENERATOR) * 2 - 1).bfloat16()
    assert torch.equal(preprocess(pixels, (6, 6), [0.5], [0.5]), preprocess(pixels.float(), (6, 6), [0.5], [0.5]))


def test_grey_is_repeated_and_other_counts_are_refused():
    assert torch.equal(expand_channels(torch.ones(2, 1, 4, 4), 3), torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="4 channels .* takes 3"):
        expand_channels(torch.ones(2, 4, 4, 4), 3)
    with pytest.raises(ValueError, match="pass grey images"):
        expand_channels(torch.ones(2, 3, 4, 4), 1)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, DEFAULT),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, Statistics((0.5,) * 3, (0.25,) * 3, 14)),
        ({"do_normalize": False}, Statistics((0.0,) * 3, (1.0,) * 3, 14)),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 0.00392156862745098}, Statistics((0.5,), (0.5,), 14)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, replace(DEFAULT, side=224)),
        ({"size": {"height": 8, "width": 8}}, replace(DEFAULT, side=8)),
        ({"size": 384}, replace(DEFAULT, side=384)),
        ({"size": {"height": 32, "width": 32}, "crop_size": 9, "do_center_crop": False}, replace(DEFAULT, side=32)),
    ],
)
def test_statistics_of_image_processors(processor, expected):
    assert statistics_from_processor(processor, DEFAULT) == expected


def test_a_rescale_factor_of_its_own_is_part_of_the_statistics():
    # 0..255 times 1/127.5, then minus 1: [-1, 1]
    got = statistics_from_processor({"rescale_factor": 1 / 127.5, "image_mean": [1.0], "image_std": [1.0]}, DEFAULT)
    pixels = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    torch.testing.assert_close(preprocess(pixels, (4, 4), got.mean, got.std), pixels)


def test_a_std_of_zero_is_refused():
    with pytest.raises(ValueError, match="must not hold 0"):
        statistics_from_processor({"image_std": [0, 1, 1]}, DEFAULT)
