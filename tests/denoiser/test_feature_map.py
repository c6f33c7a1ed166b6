"""What a layer gave, as tokens and as a map, against plain indices."""

import pytest
import torch

from diffusers_repr import Denoiser
from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.features import FeatureOutput, pool, tokens_to_map
from diffusers_repr.noise import NoiseLevel
from tests.objectives.cases import sit
from tests.testers.models import build


@pytest.mark.parametrize("lead", [(2,), (3, 2)])
@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 6)])
def test_each_token_has_its_place(grid, lead):
    count = torch.Size(grid).numel()
    sequence = torch.randn(*lead, 5 + count + 1, 7)
    found = FeatureMap(sequence, grid, start=5, class_at=-1)
    maps, tokens = found.as_map(), found.tokens()
    assert maps.shape == (*lead, 7, *grid)
    for at, place in enumerate(torch.cartesian_prod(*map(torch.arange, grid)).tolist()):
        assert torch.equal(maps[(..., *place)], sequence[..., 5 + at, :])
        assert torch.equal(tokens[..., at, :], sequence[..., 5 + at, :])
    assert torch.equal(found.class_token(), sequence[..., -1, :])
    again = FeatureMap.from_map(maps, len(grid))
    assert again.grid == grid
    assert torch.equal(again.tokens(), tokens)
    assert again.as_map() is maps
    assert again.class_token() is None
    assert tokens.untyped_storage().data_ptr() == sequence.untyped_storage().data_ptr(), "a view"


def test_another_map_keeps_the_class_token():
    found = FeatureMap(torch.randn(2, 1 + 6, 3), (2, 3), start=1, class_at=0)
    small = torch.randn(2, 3, 1, 2)
    resized = found.with_map(small)
    assert resized.grid == (1, 2)
    assert torch.equal(resized.as_map(), small)
    assert torch.equal(resized.class_token(), found.values[:, 0])
    assert torch.equal(FeatureMap(found.values[:, 1:], (2, 3)).with_map(small).as_map(), small)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 24, 3), {"grid": (5, 5)}),
        ((2, 24, 3), {"grid": (4, 6), "start": 1}),
        ((2, 24, 3), {"grid": (4, 6), "class_at": -1}),
        ((24,), {"grid": (4, 6)}),
        ((2, 3, 4, 6), {"grid": (4, 5), "is_map": True}),
    ],
)
def test_what_does_not_fit_its_grid(shape, settings):
    with pytest.raises(ValueError, match=r"do not fit a grid of [45] x"):
        FeatureMap(torch.zeros(shape), **settings)


def test_layers_of_a_denoiser():
    denoiser = sit()
    found = denoiser.feature_map("blocks.0", torch.arange(24.0).view(1, 24, 1), (12, 8))
    assert found.grid == (6, 4)
    assert found.as_map()[0, 0, 2, 1] == 9
    maps = torch.randn(1, 5, 2, 3)
    assert torch.equal(denoiser.feature_map("x", maps, (8, 8)).tokens()[0, 4], maps[0, :, 1, 1])
    with pytest.raises(ValueError, match="is no image of maps or tokens"):
        denoiser.feature_map("blocks.0", torch.zeros(1, 23, 1), (12, 8))
    flux = Denoiser.from_pipe(build("flux"))
    block = flux.feature_map("single_transformer_blocks.0", torch.arange(70.0).view(1, 70, 1), (16, 16))
    assert (block.grid, block.start) == ((8, 8), 6)
    assert block.tokens()[0, 0] == 6  # behind six tokens of text


def test_a_video_is_read_frame_by_frame():
    values = torch.randn(2, 4 + 24, 5)
    output = FeatureOutput({"blocks.0": values}, NoiseLevel(nsr=0.5), {"blocks.0": ((2, 3, 4), 4)})
    maps = output.as_map("blocks.0")
    assert maps.shape == (2, 5, 2, 3, 4)
    assert torch.equal(maps[:, :, 1, 2, 0], values[:, 4 + 12 + 8])
    assert torch.equal(tokens_to_map(values, (2, 3, 4), 4), maps)
    place = ((2, 3, 4), 4)
    torch.testing.assert_close(pool(values, "mean", place), values[:, 4:].mean(1))
    assert torch.equal(pool(values, "max", place), values[:, 4:].amax(1))
    left = pool(values, "adaptive:2", place).view(2, 5, 2, 2)[..., 0].mean(-1)  # rows overlap in the middle one
    rows = maps[..., :2].mean((2, 4))
    torch.testing.assert_close(left, (rows[..., :2].mean(-1) + rows[..., 1:].mean(-1)) / 2)
