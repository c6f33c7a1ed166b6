import pytest
import torch

from diffusers_repr.denoiser import Denoiser, FeatureMap
from diffusers_repr.objectives import REPAObjective
from diffusers_repr.objectives.matching import interpolate_tokens, pool_tokens, with_grid
from tests.objectives.cases import LINEAR, SMALL, batch, shake, sit, teacher


def looped_average(tokens: FeatureMap, grid):
    """Mean over the tokens that each coarser cell touches."""
    (h, w), out = tokens.grid, []
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = range(i * h // grid[0], -(-(i + 1) * h // grid[0]))
            columns = range(j * w // grid[1], -(-(j + 1) * w // grid[1]))
            cells = [tokens.tokens()[:, r * w + c] for r in rows for c in columns]
            out.append(torch.stack(cells).mean(0))
    return torch.stack(out, 1)


def axis_weights(old, new):
    """Triangle filter, widened where the grid shrinks, of pixel centres; rows add up to 1."""
    scale = old / new
    width = max(scale, 1.0)
    rows = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * scale
        for j in range(old):
            rows[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / width)
    return rows / rows.sum(1, keepdim=True)


def plainly_resized(tokens: FeatureMap, grid):
    rows, columns = axis_weights(tokens.grid[0], grid[0]), axis_weights(tokens.grid[1], grid[1])
    maps = tokens.as_map().double()
    return torch.einsum("ih,bdhw,jw->bijd", rows, maps, columns).flatten(1, 2)


@pytest.mark.parametrize("grid", [(2, 3), (4, 2), (3, 4), (1, 1)])
def test_pooling_equals_the_loop(grid):
    tokens = FeatureMap(torch.randn(2, 24, 5, dtype=torch.float64), (4, 6))
    pooled = pool_tokens(tokens, grid)
    assert pooled.grid == grid
    assert torch.allclose(pooled.tokens(), looped_average(tokens, grid))


@pytest.mark.parametrize("grid", [(8, 12), (2, 3), (7, 6), (3, 3)])
def test_interpolation_equals_the_plain_way(grid):
    tokens = FeatureMap(torch.randn(2, 24, 5), (4, 6))
    resized = interpolate_tokens(tokens, grid)
    assert resized.grid == grid
    assert torch.allclose(resized.tokens().double(), plainly_resized(tokens, grid), atol=1e-5)


def test_equal_grids_are_left_alone():
    tokens = FeatureMap(torch.randn(2, 6, 3), (2, 3))
    assert pool_tokens(tokens, (2, 3)) is tokens
    assert interpolate_tokens(tokens, (2, 3)) is tokens


def test_every_mode_in_the_objective():
    data = {**batch(2), "noise": torch.randn(2, 3, 8, 8), "time": torch.tensor([300.0, 600.0])}
    coarse, fine = teacher(4), teacher(1)
    for mode, encoder in (("pool_student", coarse), ("interpolate_teacher", coarse), ("interpolate_teacher", fine)):
        objective = REPAObjective(sit(), [encoder], "blocks.1", match_grid=mode, label_dropout=0.0, **SMALL)
        got = objective(data)["alignment"].item()
        _, step = objective.observe(objective.noised(data))
        student, features = step.layers["blocks.1"], encoder.encode_pixels(data["pixel_values"])
        wanted = FeatureMap(features.tokens, features.grid)
        projector = objective.losses["alignment"].projectors[0]
        if mode == "pool_student":
            projected = projector(looped_average(student, (2, 2)), (2, 2)).double()
            target = wanted.values.double()
        else:
            projected, target = projector(student.values, (4, 4)).double(), plainly_resized(wanted, (4, 4))
        cosine = torch.nn.functional.cosine_similarity(projected, target, dim=-1).mean().item()
        assert got == pytest.approx(-cosine, abs=1e-5)


def test_the_image_is_resized_for_the_teacher():
    encoder = teacher(4)  # 2 x 2 at 8 pixels; 4 x 4 at 16
    objective = REPAObjective(sit(), [encoder], "blocks.1", match_grid="resize_image", **SMALL)
    resized = objective.encoders["teacher"]
    assert (resized.grid_for((8, 8)), encoder.grid_for((8, 8))) == ((4, 4), (2, 2))
    assert resized.module is encoder.module
    data = batch(2)
    large = torch.nn.functional.interpolate(data["pixel_values"], size=(16, 16), mode="bicubic")
    assert torch.allclose(
        resized.encode_pixels(data["pixel_values"]).tokens, encoder.encode_pixels(large).tokens, atol=1e-5
    )
    assert objective(data)["alignment"].item() <= 1
    assert resized.fingerprint() != encoder.fingerprint()


def test_an_encoder_that_cannot_be_resized():
    class Fixed:
        name, dim = "fixed", 4

        def grid_for(self, size):
            return (3, 3)

        def fingerprint(self):
            return {}

    with pytest.raises(ValueError, match=r"'fixed' cannot be given images such that its grid is 4 x 4"):
        REPAObjective(sit(), [Fixed()], "blocks.1", match_grid="resize_image", **SMALL)
    assert with_grid(Fixed(), (3, 3), (8, 8), "x").name == "fixed"


def test_pooling_to_a_finer_grid_is_refused():
    with pytest.raises(ValueError, match=r"coarser grid; layer 'blocks.1' has 4 x 4, encoder 'teacher' 8 x 8"):
        REPAObjective(sit(), [teacher(1)], "blocks.1", match_grid="pool_student", **SMALL)


def test_images_that_are_not_square():
    network = shake(sit(sample_size=(8, 12)).model)
    objective = REPAObjective(Denoiser(network, schedule=LINEAR), [teacher()], "blocks.1", **SMALL)
    data = {"pixel_values": torch.randn(2, 3, 8, 12), "class_labels": torch.tensor([0, 1])}
    assert -1 <= objective(data)["alignment"].item() <= 1
