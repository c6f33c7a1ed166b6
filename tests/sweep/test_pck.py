"""`select_features(..., metric="pck")`: every cell is what `Correspondence.evaluate` measures of it."""

import pytest

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.sweep import PCKMeasure, Selection, select_features
from diffusers_repr.tasks.correspondence import Correspondence
from tests.sweep.selection_models import striped
from tests.tasks.correspondence_cases import denoiser, pairs, photo, shifted
from tests.testers.models import build

QUICK = {"progress": False, "seeds": (0, 1), "finalists": 2, "image_size": (40, 56), "batch_size": 1}


def test_cells_are_the_pck_of_their_features(tmp_path):
    held = pairs()
    found = select_features(denoiser(), held, None, [10, 400], metric="pck", layers=["flat", "sharp"], **QUICK)
    assert (found.best.layer, found.metric) == ("sharp", "pck")
    assert len(found.cells) == 4
    for cell in found.cells:
        source = FeatureExtractor(denoiser(), cell.layer, cell.timestep, image_size=(40, 56), batch_size=1)
        assert cell.score == Correspondence(source).pck_report(held).all.per_point
    assert found.best.mean is not None
    assert found.sets == {}
    found.save(tmp_path, heatmap=False)
    task = Correspondence(Selection.load(tmp_path).extractor(denoiser()))
    assert task.pck_report(held).all.per_point == found.best.score


@pytest.mark.parametrize("name", ["sd", "dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd3", "sdxl"))])
def test_any_family(name):
    """Maps and tokens, text left out: the best layer's score is the task's own."""
    model = Denoiser.from_pipe(build(name))
    image = photo(32, 32)
    own = [(image, shifted(image, 4, 0), [[9, 9], [20, 14], [11, 25]], [[13, 9], [24, 14], [15, 25]], (0, 0, 30, 30))]
    settings = {"metric": "pck", "seeds": (0,), "progress": False, "image_size": 32}
    found = select_features(model, own, None, [100], **settings)
    assert len(found.cells) > 3
    source = FeatureExtractor(model, found.best.layer, 100, image_size=32)
    assert Correspondence(source).pck_report(ImagePairs.from_list(own)).all.per_point == found.best.score


def test_settings_of_the_measure():
    held = pairs()
    settings = {"layers": ["sharp"], **QUICK, "seeds": (0,)}
    for changes in ({"alpha": 0.02}, {"per": "image"}, {"reference": "image"}):
        found = select_features(denoiser(), held, None, [10], metric=PCKMeasure("pck", **changes), **settings)
        source = FeatureExtractor(denoiser(), "sharp", 10, image_size=(40, 56), batch_size=1)
        how = {name: value for name, value in changes.items() if name != "per"}
        want = Correspondence(source).pck_report(held, **how).all
        assert found.best.score == (want.per_image if "per" in changes else want.per_point)
        assert found.recipe["measure"] == {"alpha": 0.1, "reference": "box", "per": "point", **changes}


def test_pairs_as_a_list_and_what_is_refused():
    held = pairs()
    rows = [(held.image(p.source), held.image(p.target), p.source_points, p.target_points, p.box) for p in held.pairs]
    both = [
        select_features(denoiser(), given, None, [10], metric="pck", layers=["sharp"], **QUICK)
        for given in (held, rows)
    ]
    assert both[0].best.seed_scores == both[1].best.seed_scores
    with pytest.raises(ValueError, match="PCK fits nothing.*validation=None"):
        select_features(denoiser(), held, held, [10], metric="pck")
    with pytest.raises(TypeError, match=r"ImagePairs, or a list of .* got Tensor"):
        select_features(denoiser(), striped(4)[0], None, [10], metric="pck")
    with pytest.raises(ValueError, match="no box of its object"):
        select_features(denoiser(), [row[:4] for row in rows], None, [10], metric="pck")
    with pytest.raises(ValueError, match="per is 'point' or 'image'"):
        select_features(denoiser(), held, None, [10], metric=PCKMeasure("pck", per="pair"), **QUICK)
    with pytest.raises(ValueError, match="pass max_layers=1"):
        select_features(denoiser(), held, None, [10], metric="pck", max_layers=2)
