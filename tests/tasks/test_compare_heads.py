"""The comparison of heads: which to take by hand-made scores, the accuracies by the slow way, and bad input."""

import json

import pytest
import torch

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.cli import main
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.heads import PROTOCOLS, fit_head
from diffusers_repr.sweep import select_features
from diffusers_repr.tasks import HeadComparison, HeadPlaces, HeadScore, compare_heads
from diffusers_repr.tasks.head_scores import nested_rows
from tests.tasks.planted import dataset, pipeline
from tests.tasks.planted import images as data
from tests.testers.models import build

PLACES = HeadPlaces("mid_block", 20, ("down_blocks.0", "mid_block"), (20, 60), "mid_block")
SMALL = {name: {"width": 8, "num_layers": 1, "num_attention_heads": 2} for name in ("attention", "difformer")}


def score(name, accuracies, parameters=10, forwards=0.5, share=1.0, **more):
    return HeadScore(name, share, 100, tuple(accuracies), forwards, parameters, 1.0, **more)


def test_which_to_take():
    """Within the larger standard deviation: fewer forwards first, then fewer parameters; else the best."""
    linear, mlp, big = score("linear", (0.90, 0.92, 0.94)), score("mlp", (0.93, 0.93, 0.93), 99), score(
        "difformer", (0.935, 0.935, 0.935), 5, forwards=1.5
    )  # fmt: skip
    found = HeadComparison((big, mlp, linear), {}, {})
    choice = found.choose()
    assert (choice.take, choice.best) == ("linear", "difformer")
    assert (
        "within the spread over seeds; it takes 1.50 forwards of the network an image and 5 parameters" in choice.why
    )
    worse = score("linear", (0.90, 0.91, 0.92))
    choice = HeadComparison((big, mlp, worse), {}, {}).choose()
    assert (choice.take, choice.best) == ("difformer", "difformer")
    assert "The next is `mlp`, 0.930 ± 0.000, beyond the spread" in choice.why
    pixels = score("pixels", (0.95, 0.95, 0.95), 1, 0.0, baseline=True)
    found = HeadComparison((mlp, worse, pixels), {}, {"diffeed": "no U-Net"})
    assert found.choose().take == "mlp"
    assert "But `pixels` reaches 0.950 ± 0.000 without what the model has learned" in found.choose().why
    assert "`diffeed` took no part: no U-Net" in found.words()
    assert "| mlp | **93.0 ± 0.0** | 0.50 | 99 | 1.0 |" in found.table()
    assert "| pixels (baseline) | 95.0 ± 0.0 |" in found.table()


def test_shares_are_nested_and_hold_every_class():
    labels = [0] * 50 + [1] * 30 + [2]
    order = torch.randperm(81, generator=torch.Generator().manual_seed(0)).tolist()
    parts = nested_rows(labels, [0.1, 1.0, 0.01], order)
    assert [len(rows) for rows in parts.values()] == [3, 9, 81]
    assert set(parts[0.01]) < set(parts[0.1]) < set(parts[1.0])
    assert [sorted(labels[row] for row in parts[0.1]).count(c) for c in range(3)] == [5, 3, 1]
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        nested_rows(labels, [0.0], order)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pipe(pipeline())


def test_every_head_by_one_command(denoiser, tmp_path):
    """All seven and the baselines; the linear ones are what `fit_head` gives on features that are read by hand."""
    (train, labels), (test, truth) = data(24, 0), data(30, 1)
    lines = []
    found = compare_heads(
        denoiser, (train, labels), (test, truth), PLACES, shares=(0.5, 1.0), seeds=(4,), epochs=2, map_size=2,
        head_options={**SMALL, "diffeed": SMALL["attention"], "convolution": {"hidden_features": [8],
                      "norm_num_groups": 4}}, progress=lines.append,
    )  # fmt: skip
    names = ["linear", "mlp", "knn", "random", "pixels", "convolution", "attention", "difformer", "diffeed"]
    assert list(dict.fromkeys(one.name for one in found.scores)) == names
    assert not found.skipped
    assert len(lines) == 2 * len(names)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    labels, truth = torch.as_tensor(labels), torch.as_tensor(truth)
    protocol = PROTOCOLS["adam-maps"].replace(epochs=2, warmup_epochs=1, standardize=True)
    for name, model in (("linear", denoiser), ("random", untrained(denoiser, 4))):
        read = FeatureExtractor(model, "mid_block", 20, pooling="mean", seed=4)
        generator = torch.Generator().manual_seed(4)
        x = read(train)["mid_block"][rows]
        head = fit_head(x, labels[rows], 3, protocol=protocol, generator=generator).head
        wanted = float((head(read(test)["mid_block"]).argmax(1) == truth).double().mean())
        ours = next(one for one in found.of(1.0) if one.name == name)
        assert ours.accuracies[0] == pytest.approx(wanted, abs=1 / 30 + 1e-9)
    by_name = {one.name: one for one in found.of(1.0)}
    share = by_name["linear"].forwards
    assert by_name["difformer"].forwards == pytest.approx(2 * share)
    assert by_name["pixels"].forwards == 0
    assert share < by_name["diffeed"].forwards < 2
    assert by_name["knn"].parameters == 24 * 16
    found.save(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["choices"][1]["take"] == found.choose().take
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_a_transformer_has_no_feedback():
    dit = Denoiser.from_pipe(build("dit"))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, *dit.image_size, generator=generator)
    block = "transformer_blocks.0"
    places = HeadPlaces(block, 81, (block,), (81, 121), block)
    found = compare_heads(
        dit, (images[:8], torch.arange(8) % 2), (images[8:], torch.arange(4) % 2), places, heads=["linear", "diffeed"],
        baselines=["random"], shares=[1.0], seeds=[0], epochs=1,
    )  # fmt: skip
    assert "no decoder stages" in found.skipped["diffeed"]
    assert [one.name for one in found.scores] == ["linear", "random"]


def test_places_of_a_selection(denoiser):
    found = select_features(
        denoiser,
        data(24, 0),
        data(12, 1),
        [20, 60, 200],
        max_layers=1,
        max_levels=1,
        seeds=(0,),
        finalists=1,
        progress=False,
    )
    places = HeadPlaces.of(found, 2)
    assert (places.layer, places.timestep) == (found.best.layer, found.best.timestep)
    assert places.layer in places.layers
    assert len({path.split(".")[0:2][-1] for path in places.layers}) == 2
    assert len(places.timesteps) == 2
    assert places.decoder.startswith(("mid_block", "up_blocks"))


def test_the_command(tmp_path, capsys):
    pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        dataset(18, seed).to_parquet(tmp_path / "data" / f"{split}.parquet")
    command = ["compare", str(tmp_path / "model"), str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--quiet"]
    args = ["--timesteps", "50", "--heads", "knn", "--shares", "1", "--seeds", "0", "--epochs", "1"]
    assert main([*command, *args]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["recipe"]["places"]["timestep"] == 50
    assert found["recipe"]["test"]["split"] == "test"
    printed = capsys.readouterr().out
    assert "| knn | **" in printed
    assert "With all labels (18 images) take `knn`" in printed
    assert main([*command, "--overwrite"]) == 2
    assert "Give --timesteps" in capsys.readouterr().err


def test_bad_input(denoiser):
    (train, labels), test = data(12, 0), data(9, 1)
    for settings, said in (
        ({"heads": ["linaer"]}, "expected some of linear, mlp"),
        ({"heads": []}, "at least one head"),
        ({"seeds": [1, 1]}, "each once"),
        ({"shares": [0.1, 1.5]}, "above 0 and up to 1"),
        ({"epochs": 0}, "epochs"),
        ({"baselines": ["sift"]}, "expected some of random, pixels"),
        ({"heads": ["knn"], "head_options": {"mlp": {}}}, "not among"),
        ({"protocol": PROTOCOLS["adam"]}, "standardize=False"),
    ):
        with pytest.raises(ValueError, match=said):
            compare_heads(denoiser, (train, labels), test, PLACES, **settings)
    with pytest.raises(ValueError, match="have no image in"):
        compare_heads(denoiser, (train, [2 * (label > 0) for label in labels]), test, PLACES)
    with pytest.raises(ValueError, match="one class"):
        compare_heads(denoiser, (train, labels), (test[0], [0] * 9), PLACES)
