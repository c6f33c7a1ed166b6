"""DDAE's grid of linear probes, against the planted truth and the slow way."""

import json

import pytest
import torch

from diffusers_repr import FeatureExtractor
from diffusers_repr.cli import main
from diffusers_repr.features.views import crop_and_flip
from diffusers_repr.heads import PROTOCOLS
from diffusers_repr.heads.fitting.stacked import train_linear_heads
from diffusers_repr.sweep import TrainedHeads, select_features
from tests.cli.test_probe_commands import dataset, place  # noqa: F401
from tests.sweep.selection_models import Rows, planted, striped

FAST = PROTOCOLS["ddae"].replace(learning_rate=0.1, epochs=12, batch_size=16)
BASE = {"progress": False, "seeds": (0,)}


@pytest.fixture(scope="module")
def data():
    return striped(64, 0), striped(48, 1)


def model():
    return planted(early=Rows((4, 5)), middle=Rows((4,), (0, 2), 10), late=Rows((6, 7)))


def slow_scores(denoiser, train, held, timestep, layer, measure, noise="per_image"):
    """Features read one reading at a time, and a head trained on them alone."""
    readings = []
    for draw in range(measure.draws):
        keys = [f"0:{row}:{draw}" for row in range(len(train[0]))]
        views = train[0]
        if measure.augments:
            views = (crop_and_flip(2 * views - 1, keys, measure.crop, measure.flip) + 1) / 2
        read = FeatureExtractor(denoiser, layer, timestep, noise, pooling="mean", seed=draw * 2**33)
        readings.append(read(views)[layer])
    stack = train_linear_heads(torch.stack(readings)[None], train[1], 4, measure.protocol)
    found = FeatureExtractor(denoiser, layer, timestep, noise, pooling="mean")(held[0])[layer]
    return float((stack.logits(found[None])[0].argmax(1) == held[1]).double().mean())


@pytest.mark.parametrize("settings", [{}, {"draws": 3}, {"draws": 2, "crop": 2, "flip": True}], ids=str)
def test_planted_signal_and_the_slow_way(data, settings):
    measure, denoiser = TrainedHeads("accuracy", protocol=FAST, **settings), model()
    found = select_features(denoiser, *data, [5, 10], metric=measure, batch_size=24, **BASE)
    if not measure.augments:  # moved rows are other rows
        assert (found.best.layer, found.best.timestep) == ("middle", 10)
        assert found.best.score > 0.9
    for cell in found.cells:
        slow = slow_scores(denoiser, *data, cell.timestep, cell.layer, measure)
        assert cell.score == pytest.approx(slow, abs=1 / 48 + 1e-9)
    assert sum(cell.score > 0.6 for cell in found.cells) <= 1
    readings = settings.get("draws", 1)
    assert found.recipe["forwards"] == 6 * readings + 4
    assert found.recipe["measure"]["draws"] == readings
    assert not found.sets


def test_memory_changes_nothing(data):
    measure = TrainedHeads("accuracy", protocol=FAST)
    whole = select_features(model(), *data, [5, 10], metric=measure, **BASE)
    parts = select_features(model(), *data, [5, 10], metric=measure, memory_gib=5000 / 2**30, **BASE)
    assert [cell.score for cell in parts.cells] == [cell.score for cell in whole.cells]
    assert parts.recipe["forwards"] > whole.recipe["forwards"]


def test_views_are_windows():
    images = torch.rand(64, 1, 4, 5) * 2 - 1
    views = crop_and_flip(images, range(64), 1, True)
    assert torch.equal(crop_and_flip(images[7:8], [7], 1, True)[0], views[7])
    mirrored = set()
    for image, view in zip(images, views, strict=True):
        padded = torch.full((1, 6, 7), -1.0)
        padded[:, 1:5, 1:6] = image
        windows = [padded[:, y : y + 4, x : x + 5] for y in range(3) for x in range(3)]
        matches = [at for at, w in enumerate(windows + [w.flip(-1) for w in windows]) if torch.equal(w, view)]
        assert len(matches) == 1
        mirrored.add(matches[0])
    assert len(mirrored) > 12  # of 18 places


def test_the_command_reads_no_test_labels(place, tmp_path):  # noqa: F811
    """The test split's labels shuffled: the same selection, to the last digit."""
    train, held = dataset(24, 0), dataset(24, 1)
    found = []
    for name, labels in (("straight", held["label"]), ("shuffled", held["label"][::-1])):
        folder = tmp_path / name
        folder.mkdir()
        train.to_parquet(folder / "train.parquet")
        held.to_parquet(folder / "validation.parquet")
        held.remove_columns("label").add_column("label", labels).cast(held.features).to_parquet(
            folder / "test.parquet"
        )
        args = ["--timesteps", "50", "--seeds", "0", "--layers", "mid_block", "up_blocks.0", "--no_heatmap", "--quiet"]
        ddae = ["--criterion", "ddae", "--draws", "2", "--crop", "1", "--flip", "--out", str(tmp_path / f"{name}-out")]
        assert main(["select", str(place / "model"), str(folder), *args, *ddae]) == 0
        selection = json.loads((tmp_path / f"{name}-out" / "selection.json").read_text())
        assert selection["recipe"]["measure"]["protocol"]["name"] == "ddae"
        found.append((selection["cells"], selection["best"]))
    assert found[0] == found[1]


def test_bad_input(data):
    for settings, said in (
        ({"criterion": "mae"}, "a grid of heads is trained by adam or sgd without BatchNorm"),
        ({"criterion": "lbfgs"}, "expected one of ridge, lda, adam, ddae"),
        ({"draws": 2}, "belong to heads that are trained by gradient steps"),
        ({"criterion": "ddae", "metric": "r2"}, "it has accuracy, balanced_accuracy"),
        ({"criterion": "ddae", "draws": 0}, "draws"),
        ({"criterion": "ddae", "crop": -1}, "crop"),
        ({"criterion": "ddae", "draws": 2, "noise": "clean"}, "every reading of an image is the same"),
        ({"criterion": "ddae", "max_layers": 2}, "Sets are grown from the sums"),
        ({"metric": TrainedHeads("accuracy"), "flip": True}, "set them there"),
    ):
        with pytest.raises(ValueError, match=said):
            select_features(model(), *data, [5], **BASE, **settings)
