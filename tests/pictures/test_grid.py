"""Grids of samples: every tile where it belongs, gaps between, and words that do not touch it."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr.pictures.grid import image_grid

EDGE, GAP = 6, 4


def tile(sheet: np.ndarray, row: int, column: int, rows: int, columns: int, side: int) -> np.ndarray:
    """Counted from the lower right corner, where no words are."""
    bottom = sheet.shape[0] - EDGE - (rows - 1 - row) * (side + GAP)
    right = sheet.shape[1] - EDGE - (columns - 1 - column) * (side + GAP)
    return sheet[bottom - side : bottom, right - side : right]


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_lie_in_rows_and_are_the_images(channels):
    images = torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    words = {"row_titles": ["first", "second\nline"], "column_titles": ["a", "b", "c"]}
    sheet = np.array(image_grid(images, 3, title="of", side=35, **words))
    for at, image in enumerate(images):
        pixels = (image * 255).round().to(torch.uint8).expand(3, 8, 8).permute(1, 2, 0).numpy()
        enlarged = np.kron(pixels, np.ones((4, 4, 1), dtype=np.uint8))
        np.testing.assert_array_equal(tile(sheet, *divmod(at, 3), 2, 3, 32), enlarged)
    assert (tile(sheet, 1, 2, 2, 3, 32) == 255).all()  # the last row is short
    plain = np.array(image_grid(images, 3, side=35))
    assert plain.shape == (2 * EDGE + 2 * 32 + GAP, 2 * EDGE + 3 * 32 + 2 * GAP, 3)
    assert (plain[:, EDGE + 32 : EDGE + 32 + GAP] == 255).all()


def test_words_stand_where_they_belong():
    images = torch.zeros(4, 1, 8, 8)
    bare = image_grid(images, 2)
    sheet = image_grid(images, 2, title="A title", row_titles=["named", ""], column_titles=["x", "a long name"])
    left, top = sheet.width - 2 * EDGE - GAP, sheet.height - bare.height
    assert top > 0
    assert left > bare.width - 2 * EDGE - GAP  # room for the long name, and for the names of rows
    grey = np.array(sheet.convert("L"))
    side = 64
    first, second = (grey[grey.shape[0] - EDGE - (2 - row) * side - (1 - row) * GAP :][:side, :30] for row in (0, 1))
    assert first.min() < 128
    assert second.min() == 255
    assert grey[: top // 2].min() < 128


def test_images_of_pillow_keep_their_proportions():
    images = [Image.new("L", (16, 8), 255), Image.new("RGB", (8, 16), "red")]
    sheet = image_grid(images, side=64)
    assert sheet.size == (2 * EDGE + 2 * 64 + GAP, 2 * EDGE + 64)
    red = np.array(sheet)[:, -EDGE - 64 : -EDGE].reshape(-1, 3)
    assert ((red == (255, 0, 0)).all(1)).sum() == 32 * 64
    assert image_grid([Image.new("RGB", (100, 70))]).size == (100 + 2 * EDGE, 70 + 2 * EDGE)


def test_what_does_not_fit_is_refused():
    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match="3 row_titles for 2: 4 images in 2 columns"):
        image_grid(images, 2, row_titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 column_titles for 2"):
        image_grid(images, 2, column_titles=["a"])
    with pytest.raises(ValueError, match="got 0 images"):
        image_grid([])
    with pytest.raises(ValueError, match=r"\(N, 1 or 3, H, W\)"):
        image_grid(torch.zeros(4, 2, 8, 8))
