"""`to_pixels`: what a grey value of each form of image becomes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr.denoiser.images import to_pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (2, 6)])
def test_sixteen_bits_span_the_range(channels, size):
    array = np.full((4, 8), 16384, np.uint16)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    for image in (Image.open(file), Image.fromarray(array)):
        assert image.mode == "I;16"
        pixels = to_pixels(image, channels, size)
        assert pixels.shape == (1, channels, *(size or (4, 8)))
        torch.testing.assert_close(pixels, torch.full_like(pixels, 2 * 16384 / 65535 - 1))


@pytest.mark.parametrize(("mode", "value"), [("I", 30000), ("F", 0.5)])
def test_modes_without_a_range_are_refused(mode, value):
    with pytest.raises(ValueError, match=f"Image 1 .* of mode '{mode}' has no known range"):
        to_pixels([Image.new("L", (4, 4)), Image.new(mode, (4, 4), value)], 1)


@pytest.mark.parametrize(("mode", "color"), [("L", 51), ("RGB", (51, 51, 51)), ("LA", (51, 255)), ("1", 0)])
def test_eight_bits(mode, color):
    want = 2 * (0.0 if mode == "1" else 0.2) - 1
    for channels in (1, 3):
        pixels = to_pixels(Image.new(mode, (4, 4), color), channels)
        torch.testing.assert_close(pixels, torch.full((1, channels, 4, 4), want))


def test_read_only_and_mirrored_arrays_are_copied(recwarn):
    array = np.arange(16, dtype=np.uint8).reshape(4, 4)
    want = to_pixels(array.copy(), 1)
    array.flags.writeable = False
    assert torch.equal(to_pixels(array, 1), want)
    assert torch.equal(to_pixels(array[::-1], 1), want.flip(2))
    assert not recwarn.list
