"""Hyperfeatures' loss by all places against all, and pairs whose points are where the pixels went."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffusers_repr.data.pairs import AnnotatedPairs, MovedPairs, PairConfig
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import Hyperfeatures
from diffusers_repr.objectives import HyperfeaturesConfig, HyperfeaturesObjective, keypoint_infonce
from diffusers_repr.objectives.hyperfeatures import map_cells
from tests.testers.models import build

SMALL = {"width": 8, "bottleneck": 4}


def test_the_loss_by_all_places_against_all():
    """Both similarity matrices whole, in float64, and cross-entropy over rows of key points, pair after pair."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 6, 4, 5)
    cells = torch.randint(20, (2, 2, 3))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    losses = []
    for b in range(2):
        a, c = (functional.normalize(maps[b].flatten(1).double(), dim=0) for maps in (first, second))
        logits = a.T @ c / 0.07
        for p in range(3):
            if valid[b, p]:
                forth = functional.cross_entropy(logits[cells[0, b, p]], cells[1, b, p])
                back = functional.cross_entropy(logits.T[cells[1, b, p]], cells[0, b, p])
                losses.append((forth + back) / 2)
    found = keypoint_infonce(first, second, cells, valid)
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    swapped = keypoint_infonce(second, first, cells.flip(0), valid)
    assert float(swapped) == pytest.approx(float(found), rel=1e-6)
    assert float(keypoint_infonce(first, second, cells, torch.zeros(2, 3, dtype=torch.bool))) == 0
    with pytest.raises(ValueError, match=r"cells \(2, B, P\) are needed"):
        keypoint_infonce(first, second, cells[0], valid)


def test_of_one_image_twice_the_loss_falls_to_zero():
    maps = torch.eye(9).view(1, 9, 3, 3)
    cells = torch.arange(9).expand(2, 1, 9)
    losses = [float(keypoint_infonce(maps, maps, cells, torch.ones(1, 9) > 0, t)) for t in (1.0, 0.3, 0.07, 0.01)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6


def test_cells():
    """The cell whose pixels hold the point: of 8 x 12 pixels on 2 x 3 cells."""
    points = torch.tensor([[x, y] for y in range(8) for x in range(12)], dtype=torch.float32)
    wanted = torch.tensor([(y // 4) * 3 + x // 4 for y in range(8) for x in range(12)])
    assert torch.equal(map_cells(points, (8, 12), (2, 3)), wanted)
    assert map_cells(torch.tensor([-9.0, 99.0]), (8, 12), (2, 3)) == 3


def dots(count: int, side: int = 16) -> list[Image.Image]:
    """Black images with one bright, blurred dot each."""
    y, x = np.mgrid[:side, :side]
    rng = np.random.default_rng(0)
    places = rng.uniform(5, side - 6, (count, 2))
    return [Image.fromarray((255 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 4)).astype(np.uint8)) for a, b in places]


def centre(image: torch.Tensor) -> torch.Tensor:
    """(x, y) of the brightness."""
    weights = (image / 2 + 0.5).square()
    y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in image.shape], indexing="ij")
    return torch.stack([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


def test_points_go_where_the_pixels_go():
    """The bright dot of an image and of its moved copy: the move of the points takes the one to the other."""
    data = datasets.Dataset.from_dict({"image": dots(8)}, datasets.Features({"image": datasets.Image()}))
    config = PairConfig(color_jitter=0.0, random_flip=True, max_points=400)
    pairs = MovedPairs(data, config, 1, (16, 16))
    torch.manual_seed(0)
    batch = pairs.on_device({"pixel_values": torch.stack([pairs[i]["pixel_values"] for i in range(8)])})
    assert batch["images"].shape == (2, 8, 1, 16, 16)
    assert batch["points"].shape == (2, 8, 400, 2)
    seen = 0
    for b in range(8):
        here, there = (centre(batch["images"][k, b, 0]) for k in (0, 1))
        near = (batch["points"][0, b] - here).norm(dim=1).argmin()
        if batch["valid"][b, near]:
            offset = (batch["points"][0, b, near] - here).norm()
            assert float((batch["points"][1, b, near] - there).norm()) < float(offset) * 1.5 + 0.6
            seen += 1
    assert seen > 4
    inside = ((batch["points"][1] >= -0.5) & (batch["points"][1] < 15.5)).all(-1)
    assert torch.equal(inside, batch["valid"])
    assert not bool(batch["valid"].all())


def annotated() -> datasets.Dataset:
    points = datasets.List(datasets.List(datasets.Value("float32")))
    kinds = {"image": datasets.Image(), "second_image": datasets.Image(), "points": points, "second_points": points}
    rows = {
        "image": dots(2, 16),
        "second_image": [image.resize((32, 32)) for image in dots(2, 16)],
        "points": [[[3.0, 5.0], [40.0, 1.0]], [[0.0, 15.0]]],
        "second_points": [[[6.5, 10.5], [1.0, 1.0]], [[0.5, 30.5]]],
    }
    return datasets.Dataset.from_dict(rows, datasets.Features(kinds))


def test_annotated_pairs_are_x_before_y():
    pairs = AnnotatedPairs(annotated(), PairConfig(second_column="second_image", max_points=3), 1, (16, 16))
    batch = torch.utils.data.default_collate([pairs[0], pairs[1]])
    found = pairs.on_device(batch)
    assert found["points"].shape == (2, 2, 3, 2)
    torch.testing.assert_close(found["points"][:, 0, 0], torch.tensor([[3.0, 5.0], [3.0, 5.0]]))
    torch.testing.assert_close(found["points"][:, 1, 0], torch.tensor([[0.0, 15.0], [0.0, 15.0]]))
    assert found["valid"].tolist() == [[True, False, False], [True, False, False]]


def test_the_objective_reads_what_the_source_reads():
    """The loss from descriptors of the saved kind; the frozen network gets no gradient."""
    torch.manual_seed(0)
    config = HyperfeaturesConfig("base", steps=4, reads=[0, 2], head=SMALL)
    objective = HyperfeaturesObjective(Denoiser.from_pipe(build("ddim")), (16, 16), config)
    images, points = torch.rand(2, 3, 3, 16, 16) * 2 - 1, 15 * torch.rand(2, 3, 5, 2)
    valid = torch.ones(3, 5, dtype=torch.bool)
    out = objective({"images": images, "points": points, "valid": valid})
    source = Hyperfeatures(objective.denoiser, objective.head)
    first, second = (source.from_pixels(part)["hyperfeatures"] for part in images)
    cells = map_cells(points, (16, 16), (first.shape[2], first.shape[3]))
    assert float(out["loss"]) == pytest.approx(float(keypoint_infonce(first, second, cells, valid)), rel=1e-5)
    assert objective.unsaved() == {}


def test_annotated_points_that_are_hidden_or_do_not_pair_up():
    """COCO's third number; of a pair with other numbers of points no row is made."""
    kinds = {name: datasets.Image() for name in ("image", "second_image")}
    rows = {name: [Image.new("L", (16, 16))] * 3 for name in kinds}
    points = {
        "points": [[[1, 2, 2], [3, 4, 0]], [[1, 2]], []],
        "second_points": [[[5, 6, 1], [7, 8, 1]], [[5, 6], [7, 8]], []],
    }
    number = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    data = datasets.Dataset.from_dict(
        {**rows, **points}, datasets.Features({**kinds, **dict.fromkeys(points, number)})
    )
    pairs = AnnotatedPairs(data, PairConfig(second_column="second_image", max_points=4), 1, (16, 16))
    batch = pairs.on_device({name: value[None] for name, value in pairs[0].items()})
    assert batch["valid"].tolist() == [[True, False, False, False]]
    assert batch["points"][:, 0, 0].tolist() == [[1, 2], [5, 6]]
    assert not pairs[2]["valid"].any()
    with pytest.raises(ValueError, match=r"Row 1 has 1 in 'points' and 2 in 'second_points'"):
        pairs[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_scale": 1.0}, r"`random_scale` lies in \[0, 0.9\]"),
        ({"max_points": 0}, "`max_points` must be positive"),
        ({"second_column": "b", "random_flip": True}, "`random_flip` is for moved pairs"),
    ],
)
def test_bad_pairs(settings, message):
    with pytest.raises(ValueError, match=message):
        PairConfig(**settings)


def test_bad_settings():
    with pytest.raises(ValueError, match="No base; pass --pretrained"):
        HyperfeaturesConfig()
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        HyperfeaturesConfig("x", temperature=0)
    with pytest.raises(ValueError, match="layers"):
        HyperfeaturesConfig("x", head={"layers": ["a"]})
