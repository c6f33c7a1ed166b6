import json
import warnings

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_repr import Denoiser, FeatureExtractor, list_layers
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics import UnlikeRecordsError, cka, cknna, compare
from diffusers_repr.sweep import Alignment, knn_probe, linear_probe, measure_alignment, picture
from diffusers_repr.sweep.align import default_levels
from diffusers_repr.sweep.alignment import AlignmentCell
from tests.metrics.models import images, rows_denoiser, rows_encoder, unet, vit
from tests.sweep.selection_models import Rows, planted, striped

LEVELS = [50, 400]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder.from_pretrained(vit(tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def swept(encoder):
    (x, y), test = striped(24), striped(16, seed=1)
    metrics = ("cknna", "cka", "linear", "knn")
    with pytest.warns(UserWarning, match="No cknna for conv_out"):  # one channel: all rows are alike at length 1
        return measure_alignment(unet(), encoder, (x, y), LEVELS, metrics=metrics, k=4, test=test, knn_k=3, seed=5)


def by_hand(denoiser, x, layer, timestep, seed):
    """Features of one layer at one level, image by image."""
    extractor = FeatureExtractor(denoiser, layer, timestep, pooling="mean", seed=seed)
    return torch.cat([extractor(part)[layer] for part in x.split(5)])


def test_every_cell_is_what_one_extraction_and_one_metric_give(swept, encoder):
    (x, y), (test_x, test_y) = striped(24), striped(16, seed=1)
    denoiser = unet()
    table = list_layers(denoiser)
    assert [c.layer for c in swept.cells] == 2 * [layer.path for layer in table]
    assert [c.timestep for c in swept.cells] == [50] * len(table) + [400] * len(table)
    teacher = encoder(x)["tokens"].mean(1)
    for cell in swept.cells[::5]:
        features = by_hand(denoiser, x, cell.layer, cell.timestep, 5)
        test = by_hand(denoiser, test_x, cell.layer, cell.timestep, 5)
        assert cell.scores["cknna"] == pytest.approx(cknna(features, teacher, 4), abs=1e-4)
        assert cell.scores["cka"] == pytest.approx(cka(features, teacher), abs=1e-4)
        assert cell.scores["linear"] == linear_probe(features, y, test, test_y, protocol="ridge", seed=5).accuracy
        assert cell.scores["knn"] == knn_probe(features, y, test, test_y, k=3).accuracy
        assert cell.dim == features.shape[1]
    own = encoder(test_x)["tokens"].mean(1)
    assert swept.encoder_scores["knn"] == knn_probe(teacher, y, own, test_y, k=3).accuracy
    assert set(swept.encoder_scores) == {"linear", "knn"}


def test_a_layer_that_shows_what_the_encoder_sees_scores_one():
    x = images(20)
    denoiser = rows_denoiser()
    with pytest.warns(UserWarning, match="No cka for none"), pytest.warns(UserWarning, match="No cknna for none"):
        found = measure_alignment(
            denoiser, rows_encoder(), x, [10, 500], metrics=("cka", "cknna"), k=3, noise="clean", batch_size=20
        )
    assert denoiser.model.forwards == 2  # one a level, for all layers and metrics
    assert found.best.layer == "all"
    assert found.score("all", 10) == pytest.approx(1, abs=1e-6)
    assert found.score("all", 500, "cknna") == pytest.approx(1, abs=1e-4)
    assert found.score("few", 10) < 0.9
    assert found.score("none", 10) is None
    assert found.score("none", 10, "cknna") is None


def test_noise_lowers_the_score_and_levels_are_sorted_by_noise():
    found = measure_alignment(rows_denoiser(), rows_encoder(), images(40), [900, 10, 300], ["all"], k=5)
    scores = [cell.scores["cknna"] for cell in found.cells]
    assert [cell.timestep for cell in found.cells] == [10, 300, 900]
    assert scores == sorted(scores, reverse=True)
    assert [c.nsr for c in found.cells] == sorted(c.nsr for c in found.cells)


@pytest.mark.parametrize("memory_gib", [4.0, 8 * 20 * 4 * 4 / 2**30, 8 * 20 * 4 / 2**30])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_neither_memory_nor_batch_size_matters(memory_gib, batch_size):
    settings = {"timesteps": [10, 100, 500], "layers": ["few", "all"], "k": 3}
    whole = measure_alignment(rows_denoiser(), rows_encoder(), images(20), **settings)
    denoiser = rows_denoiser()
    found = measure_alignment(
        denoiser, rows_encoder(), images(20), **settings, memory_gib=memory_gib, batch_size=batch_size
    )
    if batch_size == 64:  # passes of 3 levels (60 rows), of 2 and 1, and of single layers
        assert denoiser.model.forwards == {4.0: 1, 8 * 20 * 4 * 4 / 2**30: 2, 8 * 20 * 4 / 2**30: 6}[memory_gib]
    assert [c.layer for c in found.cells] == 3 * ["all", "few"]
    for one, other in zip(whole.cells, found.cells, strict=True):
        assert one.scores["cknna"] == pytest.approx(other.scores["cknna"], abs=1e-9)


def test_too_little_memory_is_told():
    with pytest.raises(ValueError, match="raise memory_gib"):
        measure_alignment(rows_denoiser(), rows_encoder(), images(20), [10], k=3, memory_gib=1e-9)


def test_samples_are_drawn_by_the_seed():
    x = images(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:15]
    drawn = measure_alignment(rows_denoiser(), rows_encoder(), x, [100], ["all"], k=3, samples=15, seed=3)
    by_hand = measure_alignment(rows_denoiser(), rows_encoder(), x[order.sort().values], [100], ["all"], k=3, seed=3)
    assert drawn.best.scores == by_hand.best.scores
    assert drawn.recipe["data"]["samples"] == 15
    assert drawn.recipe["data"]["images_hash"] == by_hand.recipe["data"]["images_hash"]


def test_one_denoiser_against_a_layer_of_another():
    denoiser = unet()
    encoder = Encoder.from_denoiser(denoiser, "mid_block", 100, noise_seed=2)
    found = measure_alignment(denoiser, encoder, images(20), [100, 600], ["conv_in", "mid_block"], k=3, seed=2)
    assert found.score("mid_block", 100) == pytest.approx(1, abs=1e-4)
    assert found.score("mid_block", 600) < 0.9


def test_saved_loaded_and_drawn(swept, tmp_path):
    folder = swept.save(tmp_path / "out")
    assert (folder / "alignment.png").read_bytes()[:4] == b"\x89PNG"
    again = Alignment.load(folder)
    assert again.to_dict() == swept.to_dict()
    assert again.best == swept.best
    assert len(again.table()) == len(again.cells)
    assert {"layer", "timestep", "cknna", "linear"} <= set(again.table()[0])
    (folder / "alignment.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="no alignment of format"):
        Alignment.load(folder)
    with pytest.raises(FileNotFoundError, match="has no alignment.json"):
        Alignment.load(tmp_path)


def drawn_sweep(layers, levels):
    """Cells whose score falls with the layer's place and rises with the level."""
    return [
        AlignmentCell(layer=f"layer{at}", order=at, timestep=t, nsr=t / 10, flops_share=0.1 * at, dim=2,
                      scores={"cka": 0.1 * (layers - at) + t / 1000})
        for t in levels for at in range(layers)
    ]  # fmt: skip


def test_curves_run_over_levels_with_the_best_layers_named(monkeypatch):
    monkeypatch.setattr(picture, "png_of", lambda figure: figure)
    recipe = {"model": {"name": "/home/me/runs/tuned"}, "encoder": {"name": "org/teacher"}, "data": {"samples": 9}}
    found = Alignment(tuple(drawn_sweep(8, [10, 50, 300])), ("cka",), {"cka": 0.4}, recipe)
    figure = found.plot()
    assert figure.get_suptitle() == "tuned against org/teacher, 9 images; dashed: the encoder's own"
    curves = next(axis for axis in figure.axes if axis.get_legend() is not None)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [f"layer{at}" for at in range(5)]
    named = {line.get_label(): list(line.get_ydata()) for line in curves.lines}
    assert named["layer2"] == pytest.approx([0.61, 0.65, 0.9])
    assert [text.get_text() for text in curves.get_xticklabels()] == ["10\n1.00", "50\n5.00", "300\n30"]
    assert sum(len(line.get_xdata()) == 3 and line.get_label().startswith("_") for line in curves.lines) == 3  # grey
    two = Alignment(tuple(drawn_sweep(8, [10, 50])), ("cka",), {}, recipe).plot()
    curves = next(axis for axis in two.axes if axis.get_legend() is not None)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["timestep 10", "timestep 50"]
    assert list(curves.lines[1].get_ydata()) == pytest.approx([0.1 * (8 - at) + 0.05 for at in range(8)])


def test_a_plot_has_room_for_undefined_scores():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure_alignment(rows_denoiser(), rows_encoder(), images(12), [10], k=3, noise="clean")
        nothing = measure_alignment(rows_denoiser(), rows_encoder(), images(12), [10], ["none"], k=3)
    assert found.plot()[:4] == b"\x89PNG"
    assert nothing.plot()[:4] == b"\x89PNG"
    assert nothing.to_dict()["best"] is None
    with pytest.raises(ValueError, match="undefined in all 1 cells"):
        _ = nothing.best


def test_records_of_equal_sweeps_compare_and_others_do_not(swept):
    def sweep(**changes):
        settings = {"timesteps": [100], "layers": ["all"], "k": 3} | changes
        data = settings.pop("data", images(20))
        return measure_alignment(rows_denoiser(), rows_encoder(), data, **settings).record()

    one = sweep()
    assert one - sweep() == 0
    assert one.counts == {"samples": 20}
    assert one.k == 3
    assert one.subject.endswith("all at 100")
    assert one - sweep(timesteps=[500]) > 0  # two levels of one model: what is compared
    for changes, fields in (
        ({"k": 4}, {"k", "settings"}),
        ({"data": images(21)}, {"counts", "reference"}),
        ({"data": images(20, seed=9)}, {"reference"}),
        ({"seed": 1}, {"seed"}),
        ({"noise": "clean"}, {"settings"}),
        ({"symmetric": False}, {"settings"}),
        ({"metrics": "cka"}, {"metric", "settings", "k"}),
    ):
        with pytest.raises(UnlikeRecordsError) as caught:
            compare(one, sweep(**changes))
        assert set(caught.value.fields) == fields
    assert compare(one, sweep(seed=1), ignore="seed") != 0
    probe = swept.record("linear", swept.cells[0].layer, 50)
    assert probe.settings["protocol"]["name"] == "ridge"
    assert probe.counts == {"samples": 24, "test": 16}


def test_default_levels():
    assert default_levels(unet()) == [100, 300, 500, 700, 900]
    edm = Denoiser(unet().model, EDMEulerScheduler(sigma_min=0.01, sigma_max=100))
    nsr = [float(edm.level(level).nsr) for level in default_levels(edm)]
    assert nsr == sorted(nsr)
    assert len(measure_alignment(rows_denoiser(), rows_encoder(), images(20), layers="all", k=3).cells) == 5


def test_what_was_passed_in_is_as_before(encoder):
    denoiser, x = unet(), images(12)
    denoiser.model.train()
    state = torch.random.get_rng_state()
    measure_alignment(denoiser, encoder, x, [100], ["mid_block"], k=3)
    assert denoiser.model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not denoiser.model.mid_block._forward_hooks


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"k": 12}, ValueError, "k must be a whole number from 1 to 11"),
        ({"metrics": "cnka"}, ValueError, "Unknown metric 'cnka'"),
        ({"metrics": ()}, ValueError, "at least one"),
        ({"metrics": ("cka", "cka")}, ValueError, "each once"),
        ({"layers": ["al"]}, ValueError, "al"),
        ({"timesteps": []}, ValueError, "empty"),
        ({"timesteps": 100}, TypeError, "list of levels"),
        ({"timesteps": [100, 100]}, ValueError, "twice"),
        ({"features": "cls"}, ValueError, "'global' features"),
        ({"samples": 13}, ValueError, "from 1 to 12"),
        ({"noise": "none"}, ValueError, "noise policy"),
        ({"metrics": "linear"}, ValueError, "pass test="),
        ({"metrics": "linear", "test": images(3)}, TypeError, "data must be ImageData"),
        ({"metrics": "knn", "data": striped(12), "test": striped(4), "knn_k": 13}, ValueError, "knn_k"),
        ({"protocol": "ridg"}, ValueError, "Unknown protocol"),
        ({"encoder": torch.nn.Identity()}, TypeError, "encoder must be an Encoder"),
        ({"data": []}, ValueError, "has no images"),
        ({"data": "folder"}, TypeError, r"data must be ImageData.* load_images\('folder'\) .* opens it"),
        ({"data": [images(1)[0], images(1, side=16)[0]]}, ValueError, "mixed sizes"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_input(settings, error, message):
    defaults = {"encoder": rows_encoder(), "data": images(12), "timesteps": [10], "layers": ["all"], "k": 1}
    settings = defaults | settings
    with pytest.raises(error, match=message):
        measure_alignment(rows_denoiser(), settings.pop("encoder"), settings.pop("data"), **settings)


def test_features_that_are_not_finite_name_their_layer():
    broken = planted(good=Rows(range(8)), bad=Rows(range(8), fault=float("nan")))
    with pytest.raises(FloatingPointError, match="'bad'"):
        measure_alignment(broken, rows_encoder(), images(12), [10], k=3)


def test_pixels_reach_the_encoder_unresized():
    x = images(3)
    assert torch.allclose(rows_encoder()(x)["global"], to_pixels(x, 1)[:, 0].mean(2), atol=1e-6)
