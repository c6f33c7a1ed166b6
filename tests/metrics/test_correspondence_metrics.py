"""Cosine at low resolution against brute force, mutual neighbours, PCK, corner errors, DAVIS' J and F."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_repr.metrics.corner_error import corner_accuracy, corner_error, warp_points
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.metrics.nearest import mutual_nearest
from diffusers_repr.metrics.pck import correct_points, pck, reference_length
from diffusers_repr.metrics.video_masks import boundary_accuracy, mask_boundary, region_similarity, video_scores


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large(feature_map, size):
    """The map at the image's size, as DIFT makes it, float64."""
    return F.interpolate(feature_map.double()[None], size=size, mode="bilinear", align_corners=False)[0]


def brute(feature_map, size, vectors):
    u = large(feature_map, size)
    u = u / u.norm(dim=0).clamp(min=1e-300)
    return torch.einsum("nc,chw->nhw", F.normalize(vectors.double(), dim=1), u)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((16, 5, 7), (33, 41)),  # factors 6.6 and 5.86
        ((6, 6, 6), (6, 6)),
        ((8, 9, 8), (5, 31)),  # smaller along one side
        ((4, 1, 5), (9, 12)),
        ((12, 24, 20), (187, 250)),
    ],
)
def test_low_resolution_equals_brute_force(shape, size):
    feature_map, vectors = rand(*shape), rand(5, shape[0], seed=1)
    want, cosine = brute(feature_map, size, vectors), CosineMap(feature_map, size, chunk=2)
    got = cosine(vectors)
    assert got.shape == (5, *size)
    assert (got - want).abs().max() <= 5e-6
    best = cosine.best(vectors)
    for point, likeness in zip(best.points.long().tolist(), want.flatten(1), strict=True):
        first = (likeness >= likeness.max() - 1e-12).nonzero()[0]  # beyond the outermost cells' middles all are equal
        assert point == [int(first) % size[1], int(first) // size[1]]
    assert (best.scores - want.flatten(1).amax(1)).abs().max() <= 5e-6
    assert torch.allclose(CosineMap(feature_map, size)(vectors), got, atol=1e-6)


def test_nearly_opposite_neighbours_do_not_break_the_norm():
    feature_map = rand(8, 3, 4).double()
    feature_map[:, 1] = -feature_map[:, 0] * (1 + 1e-3)
    feature_map = feature_map.float()
    vectors = rand(3, 8, seed=2)
    got, want = CosineMap(feature_map, (30, 4))(vectors), brute(feature_map, (30, 4), vectors)
    assert (got - want).abs().max() < 1e-3
    assert got.abs().max() <= 1
    exactly = torch.tensor([[1.0, -1.0]]).expand(1, 1, 2)  # the middle pixel of three is a sum of opposite vectors
    assert CosineMap(exactly, (1, 3))(torch.ones(1, 1)).flatten().tolist() == [1.0, 0.0, -1.0]


def test_a_vector_of_zeros_is_like_nothing():
    assert not CosineMap(rand(4, 3, 3), (7, 7))(torch.zeros(1, 4)).any()


def test_points_are_sampled_as_the_enlarged_map_is_indexed():
    for size in ((33, 41), (4, 5)):
        feature_map = rand(6, 5, 7)
        x, y = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="xy")
        points = torch.stack([x.flatten(), y.flatten()], 1)
        want = large(feature_map, size).flatten(1).T
        assert (sample_map(feature_map, points, size) - want).abs().max() < 2e-6
    half = sample_map(feature_map, torch.tensor([[1.5, 2.0]]), (5, 7))  # between two cells of one size
    assert torch.allclose(half[0], (feature_map[:, 2, 1] + feature_map[:, 2, 2]) / 2)


def test_what_a_cosine_map_refuses():
    with pytest.raises(ValueError, match="NaN or infinite"):
        CosineMap(torch.full((2, 3, 3), torch.nan), (5, 5))
    with pytest.raises(ValueError, match=r"\(C, h, w\); got \(3, 3\)"):
        CosineMap(torch.zeros(3, 3), (5, 5))
    with pytest.raises(ValueError, match=r"must be \(N, 4\)"):
        CosineMap(rand(4, 3, 3), (5, 5)).best(rand(2, 3))
    with pytest.raises(ValueError, match="chunk must be a whole number"):
        CosineMap(rand(4, 3, 3), (5, 5), chunk=0)


@pytest.mark.parametrize("likeness", ["cosine", "l2"])
def test_mutual_neighbours_equal_a_loop(likeness, monkeypatch):
    monkeypatch.setattr("diffusers_repr.metrics.nearest._VALUES", 60)  # parts of three rows
    a, b = rand(17, 5), rand(20, 5, seed=1)
    if likeness == "cosine":
        like = F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T
    else:
        like = -((a.double()[:, None] - b.double()) ** 2).sum(-1)
    want = [(i, int(like[i].argmax())) for i in range(17) if int(like[:, like[i].argmax()].argmax()) == i]
    got = mutual_nearest(a, b, likeness)
    assert list(zip(got.first.tolist(), got.second.tolist(), strict=True)) == want
    assert torch.allclose(got.scores.double(), torch.stack([like[i, j] for i, j in want]), atol=1e-5)
    with pytest.raises(ValueError, match="5 and 4 values"):
        mutual_nearest(a, b[:, :4])
    with pytest.raises(ValueError, match="'cosine' or 'l2'"):
        mutual_nearest(a, b, "dot")


def test_pck_counts_the_bound_in():
    length = reference_length("box", (300, 400), (30, 40, 130, 90))  # 100 x 50
    assert length == 100
    truth = torch.tensor([[50.0, 60.0]]).expand(4, 2)
    off = torch.tensor([[10.0, 0.0], [0.0, 10.01], [6.0, 8.0], [8.0, 8.0]])
    assert correct_points(truth + off, truth, length).tolist() == [True, False, True, False]
    assert correct_points(torch.tensor([[7.0, 0]]), torch.zeros(1, 2), 70).all()  # 7 / 70 is 0.1; 0.1 * 70 is not 7
    assert reference_length("image", (300, 400), None) == 400


def test_pck_per_point_and_per_image():
    one, nine = torch.ones(1, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    assert (pck([one, ~nine]).per_point, pck([one, ~nine]).per_image) == (0.1, 0.5)
    assert (pck([~one, nine]).per_point, pck([~one, nine]).per_image) == (0.9, 0.5)
    found = pck([one, nine[:0]], alpha=0.05)
    assert (found.points, found.pairs, found.per_image, found.alpha) == (1, 1, 1.0, 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pck([torch.ones(0)]), "no points is undefined"),
        (lambda: reference_length("box", (9, 9)), "no box of its object.*reference='image'"),
        (lambda: reference_length("box", (9, 9), (5, 5, 5, 9)), "right of left"),
        (lambda: reference_length("object", (9, 9)), "'box' or of the 'image'"),
        (lambda: correct_points(torch.zeros(2, 2), torch.zeros(3, 2), 1), r"must both be \(N, 2\)"),
        (lambda: correct_points(torch.zeros(2, 2), torch.zeros(2, 2), 1, 0), "must be above 0"),
    ],
)
def test_what_pck_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_corner_errors():
    truth = torch.tensor([[1.1, 0.05, 4.0], [-0.02, 0.95, -3.0], [2e-4, -1e-4, 1.0]])
    moved = truth.clone()
    moved[0, 2] += 3
    moved[1, 2] += 4
    want = 0.0
    for x, y in ((0, 0), (0, 29), (39, 0), (39, 29)):
        w = 2e-4 * x - 1e-4 * y + 1
        want += math.hypot(3 / w, 4 / w) / 4
    assert corner_error(moved, truth, (30, 40)) == pytest.approx(want, rel=1e-6)
    assert corner_error(truth, truth, (30, 40)) == 0
    assert (
        corner_error(None, truth, (30, 40)) == corner_error(torch.full((3, 3), torch.nan), truth, (30, 40)) == math.inf
    )
    assert corner_accuracy({"i_a": [1.0, 6.0], "v_b": [2.9, math.inf, 4.0]}) == {
        "illumination": {1.0: 0.5, 3.0: 0.5, 5.0: 0.5},
        "viewpoint": {1.0: 0.0, 3.0: pytest.approx(1 / 3), 5.0: pytest.approx(2 / 3)},
        "all": {1.0: 0.2, 3.0: 0.4, 5.0: pytest.approx(0.6)},
    }
    assert "viewpoint" not in corner_accuracy({"i_a": [1.0]})
    with pytest.raises(ValueError, match="No pairs"):
        corner_accuracy({})
    assert torch.allclose(warp_points(truth, torch.zeros(1, 2)), torch.tensor([[4.0, -3.0]], dtype=torch.float64))


def blobs(seed, count=1):
    smooth = F.avg_pool2d(rand(count, 1, 40, 60, seed=seed), 9, 1, 4)[:, 0]
    return smooth > 0


def loop_f(truth, found, bound):
    """Boundary F by distances between single pixels."""
    a, b = (mask_boundary(mask).nonzero().double() for mask in (truth, found))
    near = torch.cdist(a, b) <= bound
    recall, precision = float(near.any(1).double().mean()), float(near.any(0).double().mean())
    return 2 * precision * recall / (precision + recall)


def test_j_and_f_equal_loops():
    for seed in range(3):
        truth, found = blobs(seed)[0], blobs(seed)[0] ^ (blobs(seed + 9)[0] & blobs(seed + 20)[0])
        both = sum(bool(t and f) for t, f in zip(truth.flatten(), found.flatten(), strict=True))
        either = sum(bool(t or f) for t, f in zip(truth.flatten(), found.flatten(), strict=True))
        assert float(region_similarity(truth, found)) == pytest.approx(both / either)
        bound = math.ceil(0.008 * math.hypot(40, 60))
        assert float(boundary_accuracy(truth, found)) == pytest.approx(loop_f(truth, found, bound))
        assert float(boundary_accuracy(truth, found, 3)) == pytest.approx(loop_f(truth, found, 3))
    empty = torch.zeros(40, 60, dtype=torch.bool)
    assert [float(f(empty, empty)) for f in (region_similarity, boundary_accuracy)] == [1, 1]
    assert [float(f(empty, truth)) for f in (region_similarity, boundary_accuracy)] == [0, 0]


def test_the_boundary_lies_on_the_upper_left_side():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2, 2] = True
    assert mask_boundary(mask).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    mask[:] = False
    mask[4, 4] = True
    assert mask_boundary(mask).nonzero().tolist() == [[3, 3], [3, 4], [4, 3]]


def test_video_scores():
    truth = torch.zeros(8, 40, 60, dtype=torch.long)
    truth[:, 5:20, 5:25], truth[:, 22:38, 30:50] = 1, 2
    truth[:, 0, 0] = 255
    found = truth.masked_fill(truth == 255, 0)
    found[0], found[-1] = 0, 0  # the end frames are not read
    found[6][truth[6] == 2] = 0  # the second object is lost in the last frame that counts
    scores = video_scores(truth, found)
    assert (scores.j[0].mean, scores.f[0].mean, scores.j[0].recall, scores.j[0].decay) == (1, 1, 1, 0)
    assert scores.j[1].mean == scores.f[1].mean == scores.j[1].recall == pytest.approx(5 / 6)
    assert scores.j[1].decay == pytest.approx(0.5)  # quarters of six frames: two frames each, the ends shared
    assert scores.j_and_f == pytest.approx(11 / 12)
    assert scores.joined([scores, scores]).j_mean == pytest.approx(scores.j_mean)
    for wrong, message in (
        (found[:, :5], "must both be"), (found + 3, "0 to 2, the objects"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            video_scores(truth, wrong)
    with pytest.raises(ValueError, match="three are needed"):
        video_scores(truth[:2], found[:2])
    with pytest.raises(ValueError, match="shows no object"):
        video_scores(truth * 0, found * 0)
