"""Masks and points go where the pixels go: crops, scales, mirrors and turns, against PIL and by hand."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusers_repr.data.placement import Placement
from diffusers_repr.data.transforms import Moves, adm_center_crop, fit_center_crop


def cropped(image, size, crop):
    if crop == "stretch":
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    return adm_center_crop(image, size[0]) if crop == "adm" else fit_center_crop(image, size)


@pytest.mark.parametrize(
    ("source", "size", "crop"),
    [
        ((6, 10), (3, 3), "fit"),  # halves, two columns fall off at each side
        ((9, 6), (2, 2), "fit"),  # thirds, odd
        ((4, 5), (12, 15), "fit"),  # tripled
        ((4, 6), (20, 20), "fit"),
        ((8, 12), (4, 4), "adm"),
        ((16, 20), (4, 4), "adm"),
        ((5, 8), (5, 5), "adm"),
        ((3, 4), (9, 9), "adm"),
        ((6, 9), (3, 3), "stretch"),
    ],
)
def test_a_point_on_a_coloured_pixel_still_lies_on_it(source, size, crop):
    placement = Placement.of(source, size, crop)
    for y, x in itertools.product(range(source[0]), range(source[1])):
        array = np.zeros(source, np.uint8)
        array[y, x] = 255
        shown = np.asarray(cropped(Image.fromarray(array), size, crop)).astype(float)
        (moved,), (inside,) = placement.points(torch.tensor([[x, y]], dtype=torch.float64))
        if not inside:
            continue
        column, row = moved.round().long().tolist()
        assert shown[row, column] == shown.max() > 0
        assert placement.mask(array)[row, column] in (0, 255)
    corners = torch.tensor([[0, 0], [source[1] - 1, source[0] - 1]], dtype=torch.float64)
    ends = placement.points(corners)[0]
    assert torch.allclose(ends.mean(0), (torch.tensor(size[::-1]).double() - 1) / 2, atol=0.51)  # crops are centred


@pytest.mark.parametrize(
    ("source", "size", "crop"),
    [
        ((37, 64), (16, 16), "adm"),
        ((50, 33), (16, 16), "adm"),
        ((20, 31), (16, 16), "adm"),
        ((37, 64), (24, 16), "fit"),
        ((33, 20), (16, 48), "fit"),
    ],
)
def test_points_follow_filters_of_any_factor(source, size, crop):
    """On a ramp, the value of a pixel tells where in the source it came from."""
    for axis in (0, 1):
        ramp = np.broadcast_to(np.expand_dims(np.arange(source[axis]), 1 - axis), source) * 3 + 20
        shown = np.asarray(cropped(Image.fromarray(ramp.astype(np.uint8)), size, crop)).astype(float)
        line = (shown[:, shown.shape[1] // 2] if axis == 0 else shown[shown.shape[0] // 2]) - 20
        origin = torch.from_numpy(line / 3).expand(2, -1).T
        back = Placement.of(source, size, crop).points(origin)[0][:, 1 - axis]
        edge = 3  # filters bend at the edges of the image
        error = (back - torch.arange(size[axis]))[edge:-edge].abs()
        scale = size[axis] / source[axis]
        assert float(error.max()) < 0.75 * max(1, scale) / 3 + 0.1


@pytest.mark.parametrize(
    ("source", "size"), [((7, 11), (5, 5)), ((13, 9), (4, 10)), ((5, 9), (10, 7)), ((6, 6), (3, 3))]
)
def test_masks_are_those_of_pil(source, size):
    """Of the nearest pixel, as PIL takes it, in the box of PIL's own crop."""
    mask = np.random.default_rng(0).integers(0, 200, source).astype(np.int32)
    image = Image.fromarray(mask.astype(np.uint8))
    fitted = ImageOps.fit(image, size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(Placement.of(source, size, "fit").mask(mask), np.asarray(fitted))
    plain = image.resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(Placement.of(source, size, "stretch").mask(mask), np.asarray(plain))


@pytest.mark.parametrize(("source", "side"), [((16, 24), 4), ((9, 15), 3), ((17, 12), 5), ((12, 5), 5), ((3, 4), 7)])
def test_masks_of_the_adm_crop_by_the_definition(source, side):
    """Each pixel, by what the crop's own steps do to the centre of a pixel."""
    mask = np.arange(source[0] * source[1]).reshape(source).astype(np.int32)
    got = Placement.of(source, (side, side), "adm").mask(mask)
    height, width = source
    while min(height, width) >= 2 * side:
        height, width = height // 2, width // 2
    scale = side / min(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = (height - side) // 2, (width - side) // 2
    for y, x in itertools.product(range(side), range(side)):
        row = int((2 * (top + y) + 1) * source[0] // (2 * height))
        column = int((2 * (left + x) + 1) * source[1] // (2 * width))
        assert got[y, x] == mask[row, column]


# What the augmentation does to a batch


def coloured(size, spots):
    """(B, 1, H, W) in [-1, 1], black with one white pixel, and that pixel as (x, y)."""
    images = torch.full((len(spots), 1, *size), -1.0)
    for image, (x, y) in zip(images, spots, strict=True):
        image[0, y, x] = 1
    return images, torch.tensor(spots, dtype=torch.float32)[:, None]


def test_mirrors_carry_masks_and_points_exactly():
    images, points = coloured((4, 6), [(x, y) for y in range(4) for x in range(6)])
    masks = (images[:, 0] > 0).long() * 7
    moves = Moves(torch.arange(24) % 2 == 0)
    shown, moved = moves.images(images), moves.masks(masks, 255)
    where, visible = moves.points(points, torch.ones(24, 1, dtype=torch.bool), (4, 6))
    assert visible.all()
    for b in range(24):
        x, y = where[b, 0].long().tolist()
        assert torch.equal(moved[b], torch.where(shown[b, 0] > 0, 7, 0))
        assert shown[b, 0, y, x] == 1
    assert torch.equal(where[1::2], points[1::2])
    assert torch.equal(where[::2, 0, 0], 5 - points[::2, 0, 0])


def test_quarter_turns_and_whole_shifts_are_exact():
    images, points = coloured((8, 8), [(1, 2), (6, 3)])
    masks, seen = (images[:, 0] > 0).long() * 9, torch.ones(2, 1, dtype=torch.bool)
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]).repeat(2, 1, 1)
    moves = Moves(None, turn)
    torch.testing.assert_close(moves.masks(masks, 255), torch.rot90(masks, 1, (1, 2)))
    torch.testing.assert_close(moves.images(images), torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    where, visible = moves.points(points, seen, (8, 8))
    assert visible.all()
    for b in range(2):
        x, y = where[b, 0].round().long().tolist()
        assert torch.rot90(images, 1, (2, 3))[b, 0, y, x] == 1
    right = torch.tensor([[[1.0, 0, -2 * 3 / 8], [0, 1, 0]]]).repeat(2, 1, 1)  # three pixels to the right
    shifted = Moves(None, right).masks(masks, 255)
    assert (shifted[:, :, :3] == 255).all()
    assert torch.equal(shifted[:, :, 3:], masks[:, :, :-3])
    where, visible = Moves(None, right).points(points, seen, (8, 8))
    torch.testing.assert_close(where[:, 0], points[:, 0] + torch.tensor([3.0, 0.0]))
    assert visible[:, 0].tolist() == [True, False]


def test_random_turns_scales_and_mirrors_keep_points_on_their_spot():
    """A round spot, anywhere in a rectangle: the centre of what is seen of it is where the point went."""
    torch.manual_seed(3)
    grid = torch.stack(torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij"))
    points = torch.rand(40, 1, 2) * torch.tensor([24.0, 16.0]) + torch.tensor([20.0, 16.0])
    away = ((grid[1] - points[..., 0, None]) ** 2 + (grid[0] - points[..., 1, None]) ** 2).sqrt()
    masks = (away < 5).long()
    images = masks[:, None] * 2.0 - 1
    moves = Moves.draw(40, "cpu", True, 30.0, 0.1, 0.2)
    shown = (moves.images(images)[:, 0] + 1) / 2
    moved = moves.masks(masks, 255)
    where, visible = moves.points(points, torch.ones(40, 1, dtype=torch.bool), (48, 64))
    assert visible.all()
    for weight in (shown, (moved == 1).float()):
        total = weight.sum((1, 2))
        centre = torch.stack([(weight * grid[i]).sum((1, 2)) / total for i in (1, 0)], dim=1)
        assert float((centre - where[:, 0]).norm(dim=1).max()) < 0.5
    assert set(moved.unique().tolist()) == {0, 1, 255}
