"""Matches between images: identity, shifts, sizes, mutual neighbours, PCK by a loop, pictures, errors."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.source import FeatureSource, require_source
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.correspondence_source import correspondence_source, middle_layer
from diffusers_repr.tasks.image_features import fill_prompt, grid_points
from tests.pipelines import sit_cases
from tests.tasks.correspondence_cases import denoiser, pairs, photo, shifted, task
from tests.testers.models import build

POINTS = [[9.5, 9.5], [21.5, 13.5], [33.5, 25.5]]


def test_an_image_matches_itself():
    """With noise, too: one image always gets the same."""
    unet = Denoiser.from_pipe(build("ddim"))
    source = FeatureExtractor(unet, "up_blocks.0", 100, ensemble_size=2, image_size=32)
    image = photo(50, 70)
    points = grid_points((50, 70), 30).round()
    found = Correspondence(source)(image, image, points, cycle=True)
    assert torch.equal(found.matches, points)
    assert (found.scores - 1).abs().max() < 1e-5
    assert not found.cycle.any()
    pair = ImagePairs.from_list([(image, image, points, points)])
    report = Correspondence(source).pck_report(pair, reference="image", alpha=0.001)
    assert (report.all.per_point, report.all.per_image, report.all.points) == (1, 1, len(points))


def test_a_shift_by_a_stride_shifts_the_match():
    image = photo()
    found = task()(image, shifted(image, 4, 8), POINTS, similarity=True)
    # The points are the middles of cells, between four pixels; matches are pixels.
    assert (found.matches - torch.tensor(POINTS) - torch.tensor([4.0, 8.0])).abs().max() <= 0.5
    assert found.scores.min() > 0.97
    assert found.similarity.shape == (3, 40, 56)
    at = found.similarity.flatten(1).argmax(1)
    assert torch.equal(torch.stack([at % 56, at // 56], 1).float(), found.matches)


def test_sizes_differ_and_points_stay_in_pixels_of_their_image():
    """The target is twice as large: matches lie at twice the places, as brute force at full resolution has it."""
    image = photo()
    large = image.resize((112, 80), Image.Resampling.NEAREST)
    own, points = task(image_size=(40, 56)), torch.tensor([[11, 10], [20, 14], [33, 27]])
    found = own(image, large, points)
    assert (found.source_size, found.target_size) == ((40, 56), (80, 112))
    a, b = (own.source(i).as_map("sharp").double() for i in (image, large))
    s = F.interpolate(a, size=(40, 56), mode="bilinear")[0]
    u = F.interpolate(b, size=(80, 112), mode="bilinear")[0]
    for (x, y), match in zip(points.tolist(), found.matches, strict=True):
        at = int(F.cosine_similarity(u, s[:, y, x, None, None], dim=0).argmax())
        assert match.tolist() == [at % 112, at // 112]
        assert (match - torch.tensor([2.0 * x, 2.0 * y])).abs().max() <= 8


def test_mutual_neighbours_of_cells_and_of_given_points():
    image = photo()
    moved = shifted(image, 8, 4)
    cells = task()(image, moved)
    inside = (cells.points[:, 0] < 48) & (cells.points[:, 1] < 36)  # the others come in on the other side
    assert int(inside.sum()) == 12 * 9
    assert torch.equal((cells.matches - cells.points)[inside], torch.tensor([[8.0, 4.0]]).expand(108, -1))
    among = [[p[0] + 8, p[1] + 4] for p in reversed(POINTS)] + [[1.5, 1.5]]
    for likeness in ("cosine", "l2"):
        found = task()(image, moved, POINTS, among, likeness=likeness)
        assert found.matches.tolist() == [[p[0] + 8, p[1] + 4] for p in POINTS]
    assert found.scores.max() <= 0
    assert len(cells.keep(inside)) == 108
    plane = cells.keep(inside).homography("lmeds", trials=50)
    want = torch.tensor([[1, 0, 8], [0, 1, 4], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(plane.matrix, want, atol=1e-6)


def test_pck_of_pairs_equals_a_loop_and_reads_each_image_once_a_side():
    held, own, reads = pairs(), task(), []
    source = own.source

    class Counted:
        denoiser, layers, image_size = source.denoiser, source.layers, source.image_size

        def __call__(self, image, **settings):
            reads.append(image)
            return source(image, **settings)

    assert isinstance(Counted(), FeatureSource)
    report = Correspondence(Counted()).pck_report(held, alpha=0.1)
    assert len(reads) == 2 + 2
    hits, shares = [], []
    for pair in held.pairs:
        found = own(held.image(pair.source), held.image(pair.target), pair.source_points)
        length = max(pair.box[2] - pair.box[0], pair.box[3] - pair.box[1])
        own_hits = [
            bool(np.hypot(*(m - t).tolist()) <= 0.1 * length)
            for m, t in zip(found.matches.double(), pair.target_points, strict=True)
        ]
        hits += own_hits
        shares.append(np.mean(own_hits))
    assert report.all.per_point == pytest.approx(np.mean(hits))
    assert report.all.per_image == pytest.approx(np.mean(shares))
    assert 0.5 < report.all.per_point < 1
    with pytest.raises(ValueError, match="no box"):
        own.pck_report(ImagePairs.from_list([(photo(), photo(), POINTS, POINTS)]))


def test_under_one_noise_pure_noise_looks_alike():
    """At the end of the process the noise is all there is: features of two images under one noise agree."""
    found = {}
    for noise in ("shared", "per_image"):
        source = FeatureExtractor(Denoiser.from_pipe(build("ddim")), "mid_block", 999, noise=noise, image_size=32)
        a, b = (source(photo(32, 32, seed))["mid_block"].flatten() for seed in (1, 2))
        found[noise] = float(F.cosine_similarity(a, b, dim=0))
    assert found["shared"] > found["per_image"] + 1e-3
    assert found["shared"] > 0.999


def test_any_source_serves():
    """A source of one's own, with a layer of its own name."""

    class Edges:
        image_size = "keep"

        def __init__(self):
            self.denoiser, self.layers = denoiser(), ["edges"]

        def __call__(self, images, *, prompt=None, class_labels=None, embeddings=None, ids=None):
            pixels = torch.from_numpy(np.array(images)).movedim(-1, 0)[None].float()
            maps = F.unfold(pixels, 4, stride=4).unflatten(2, (pixels.shape[2] // 4, -1))
            return FeatureOutput({"edges": maps}, self.denoiser.level(1), {}, None, tuple(pixels.shape[2:]))

    image = photo()
    found = Correspondence(Edges())(image, shifted(image, 8, 0), POINTS)
    assert (found.matches - torch.tensor(POINTS) - torch.tensor([8.0, 0.0])).abs().max() <= 0.5
    with pytest.raises(TypeError, match=r"got Denoiser. It has no denoiser and no layers"):
        require_source(denoiser())
    with pytest.raises(TypeError, match="got type"):
        Correspondence(FeatureExtractor)


def test_encoded_images_serve_many_times():
    image = photo()
    own = task()
    one = own.encode(image)
    assert torch.equal(
        own(one, shifted(image, 4, 0), POINTS).matches, own(image, shifted(image, 4, 0), POINTS).matches
    )
    tensor = torch.from_numpy(np.array(image)).movedim(-1, 0)
    assert torch.equal(own(tensor, np.asarray(image), POINTS).matches, own(image, image, POINTS).matches)


def test_plain_values_and_a_picture():
    image = photo()
    found = task()(image, shifted(image, 4, 0), POINTS, similarity=True, cycle=True)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["order"] == "x, y"
    assert values["source_size"] == [40, 56]
    assert values["matches"][1]["source"] == POINTS[1]
    assert set(values["matches"][0]) == {"source", "target", "score", "cycle"}
    with_maps = found.plot(height=80, title="shift")
    alone = found.keep(torch.tensor([True, False, True])).plot(height=80, correct=torch.tensor([True, False]))
    assert with_maps.height > alone.height > 80
    colours = {colour for _, colour in alone.getcolors(alone.width * alone.height)}
    assert {(40, 200, 80), (235, 50, 50)} <= colours  # a green line, and a red one
    with pytest.raises(ValueError, match="came without their images"):
        type(found)(found.points, found.matches, found.scores, (40, 56), (40, 56)).plot()
    assert repr(found) == "Matches(3 points, 56 x 40 to 56 x 40, cycle, similarity)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: t(photo(), photo(), [[30, 45]]),
            r"\(30, 45\), outside of the image of 56 x 40.*inside as \(y, x\)",
        ),
        (lambda t: t(photo(), photo(), [[30, 60]]), "x runs to the right from 0"),
        (lambda t: t(photo(), photo(), [[float("nan"), 1]]), "outside of the image"),
        (lambda t: t(photo(), photo(), []), "must be one"),
        (lambda t: t(photo(), photo(), [[1, 2, 3]]), "must be one"),
        (lambda t: t(photo(), photo(), None, [[1, 2]]), "pass points, too"),
        (lambda t: t(photo(), photo(), POINTS, [[70, 2]]), "target_points: number 0"),
        (lambda t: t(photo(), photo(), POINTS, likeness="l2"), "of mutual nearest neighbours"),
        (lambda t: t(photo(), photo(), likeness="dot"), "'cosine' or 'l2'"),
        (lambda t: t(photo(), photo(), likeness="l2", similarity=True), "maps are cosines"),
        (lambda t: t(photo(), photo(), POINTS, prompt=["a", "b", "c"]), "one for both images, or two; got 3"),
        (lambda t: t([photo(), photo()], photo(), POINTS), "One image at a time; got 2"),
        (lambda t: t(photo(6, 6), photo(), [[1, 1]]), "sees this image as one cell"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(task())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ["sharp", "flat"]}, "gives 2 layers; choose one by layer=: sharp, flat"),
        ({"timestep": [1, 2]}, "one: timestep=261, no list"),
        ({"pooling": "mean"}, "pools its features"),
    ],
)
def test_sources_that_do_not_serve(settings, message):
    with pytest.raises(ValueError, match=message):
        Correspondence(
            FeatureExtractor(denoiser(), **{"layers": "sharp", "timestep": 1, "noise": "clean", **settings})
        )
    both = FeatureExtractor(denoiser(), ["sharp", "flat"], 1)
    assert Correspondence(both, "flat").layer == "flat"
    with pytest.raises(ValueError, match="gives no layer 'sharper'"):
        Correspondence(both, "sharper")


def test_what_is_read_where_nothing_is_chosen():
    unet = Denoiser.from_pipe(build("ddim"))
    with pytest.warns(UserWarning, match=r"No paper names a layer .* metric='pck'"):
        source, prompt = correspondence_source(unet, batch_size=2)
    assert source.layers == [middle_layer(unet)]
    assert source.layers[0].startswith("up_blocks.")
    assert (source.ensemble_size, source.batch_size, prompt) == (8, 2, None)
    assert float(source.levels[0].nsr) == pytest.approx(0.725, rel=1e-3)
    chosen, _ = correspondence_source(unet, "mid_block", 50, ensemble_size=1)
    assert (chosen.layers, chosen.levels[0].timestep, chosen.ensemble_size) == (["mid_block"], 50, 1)
    assert middle_layer(Denoiser.from_pipe(build("dit"))) == "transformer_blocks.1"
    assert middle_layer(Denoiser.from_pipe(sit_cases.pipeline())) == "blocks.1"
    with pytest.raises(ValueError, match="'dift' has published choices for sd, adm-256, and this UNet2DModel"):
        correspondence_source(unet, preset="dift")
    with pytest.raises(ValueError, match="No preset for method 'dino'"):
        correspondence_source(unet, preset="dino")
    assert fill_prompt(None, "cat") is None


def test_fit_chooses_layer_and_level_on_pairs(tmp_path):
    """`flat`, the mean of a patch, tells less than `sharp`; the choice is that of `select_features`."""
    made = Correspondence.fit(
        denoiser(), pairs(), timestep=[10, 500], layers=["flat", "sharp"], noise="clean", image_size="keep"
    )
    assert made.layer == "sharp"
    assert made.recipe.chosen_on == {"dataset": "pairs", "pairs": 3}
    made.save_pretrained(tmp_path / "m")
    assert Correspondence.from_pretrained(tmp_path / "m", base=denoiser()).recipe.chosen_on == made.recipe.chosen_on
    own = Correspondence.fit(made.source, None, pairs())
    assert {score.split for score in own.recipe.scores} == {"validation"}
    with pytest.raises(ValueError, match="FeatureExtractor has a layer and a level of its own; leave out the pairs"):
        Correspondence.fit(made.source, pairs())
    with pytest.raises(ValueError, match="Pairs to choose on need levels to choose from"):
        Correspondence.fit(denoiser(), pairs())
