"""Probes: fitting and predicting, saving and loading."""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep import select_features
from diffusers_repr.tasks import Probe, ProbeRecipe
from tests.tasks.planted import LAYERS, NAMES, dataset, fitted, images, pipeline, small
from tests.testers.models import CONDITIONS, build

SETTINGS = {"layers": LAYERS, "timestep": 50, "pooling": "adaptive:2"}


# Fitting and predicting


def test_planted_classes_are_found():
    probe = fitted()
    scores = probe.evaluate(images(60, seed=2), record=False)
    assert scores["accuracy"] > 0.95
    assert scores["rows"] == 60
    output = probe(images(9, seed=3)[0])
    assert output.labels == [NAMES[i % 3] for i in range(9)]
    assert output.probabilities.shape == (9, 3)
    assert output.probabilities.dtype == torch.float32
    torch.testing.assert_close(output.probabilities.sum(1), torch.ones(9))
    for row, top in zip(output.probabilities, output.top(2), strict=True):
        assert [name for name, _ in top] == [NAMES[i] for i in row.argsort(descending=True)[:2]]
        assert [value for _, value in top] == row.sort(descending=True).values[:2].tolist()
    assert len(output.top(99)[0]) == 3
    assert [(s.name, s.split, s.rows) for s in probe.recipe.scores] == [("accuracy", "validation", 30)]


def test_features_stand_in_the_order_of_the_recipe():
    probe = small(layers=LAYERS[::-1], timestep=[50, 300])
    pictures = images(4, seed=5)[0]
    parts = []
    for t in (50, 300):
        output = FeatureExtractor(Denoiser.from_pipe(pipeline()), LAYERS, t, pooling="mean")(pictures)
        parts += [output["up_blocks.0"], output["mid_block"]]
    torch.testing.assert_close(probe.logits(pictures), probe.head(torch.cat(parts, 1)), atol=1e-4, rtol=1e-4)
    assert probe.recipe.base.features == {"up_blocks.0": 16, "mid_block": 16}


def test_every_form_of_data_gives_the_same_probe():
    pictures, labels = images(24)
    pixels = torch.stack([torch.from_numpy(np.array(p))[None] for p in pictures])
    x = images(6, seed=4)[0]
    expected = small().logits(x)
    for data in ((pixels, torch.tensor(labels)), dataset(24), from_dataset(dataset(24))):
        probe = Probe.fit(pipeline(), data, layers="mid_block", timestep=50, protocol="ridge")
        torch.testing.assert_close(probe.logits(x), expected, atol=1e-4, rtol=1e-4)
    assert probe.recipe.label_names == tuple(NAMES)
    assert small().recipe.label_names == ("0", "1", "2")


def test_a_forward_holds_batch_size_rows_ensemble_and_levels_counted():
    pipe, rows = pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["sample"])), with_kwargs=True)
    probe = small(pipe, ensemble_size=3, timestep=[10, 50], batch_size=8)
    fitting, forwards = list(rows), 24 * 3 * 2 // 8
    assert fitting == [8] * forwards
    probe(images(24)[0])
    assert rows == fitting * 2
    rows.clear()
    small(FeatureExtractor(Denoiser.from_pipe(pipe), ["mid_block"], 50, batch_size=6), batch_size=24, pooling="mean")
    assert rows == [6] * 4


def test_batch_size_changes_nothing_but_rounding():
    x = images(7, seed=4)[0]
    torch.testing.assert_close(small(batch_size=5).logits(x), small().logits(x), atol=1e-4, rtol=1e-4)
    probe = small()
    whole = probe.logits(x)
    probe.batch_size = 2
    torch.testing.assert_close(probe.logits(x), whole, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_probe_and_the_user_keeps_everything():
    pipe = pipeline()
    pipe.unet.train()
    state, weights = torch.get_rng_state(), copy.deepcopy(pipe.unet.state_dict())
    a, b = (small(pipe, protocol="ddae", seed=3) for _ in range(2))
    x = images(5, seed=4)[0]
    assert torch.equal(a.logits(x), b.logits(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.unet.training
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_an_extractor_and_a_selection_say_what_to_read():
    denoiser = Denoiser.from_pipe(pipeline())
    extractor = FeatureExtractor(denoiser, LAYERS, NoiseLevel(nsr=0.5), "clean", pooling="max", seed=4)
    probe = Probe.fit(extractor, images(24), protocol="ridge")
    recipe = probe.recipe
    assert (recipe.layers, recipe.noise, recipe.pooling, recipe.seed) == (tuple(LAYERS), "clean", "max", 4)
    assert recipe.levels[0].nsr == pytest.approx(0.5, rel=1e-3)
    assert small(timestep=NoiseLevel(nsr=0.5)).recipe.levels[0].requested == {"nsr": 0.5}

    train, validation = images(24), images(12, seed=1)
    selection = select_features(denoiser, train, validation, [50, 400], LAYERS, seeds=(0,), progress=False)
    probe = Probe.fit(denoiser, train, validation, selection=selection, use="best")
    assert probe.recipe.layers == (selection.best.layer,)
    assert probe.recipe.levels[0].timestep == selection.best.timestep


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_other_families(name, tmp_path):
    pipe = build(name)
    condition = CONDITIONS[name]
    layer = "mid_block" if name == "sd" else "transformer_blocks.0"
    given = {key: condition[key] for key in ("prompt", "class_labels") if isinstance(condition.get(key), (str, int))}
    generator = torch.Generator().manual_seed(0)
    size = Denoiser.from_pipe(pipe).image_size
    x, y = torch.rand(8, 3, *size, generator=generator), [0, 1] * 4
    probe = Probe.fit(pipe, (x, y), layers=layer, timestep=300, protocol="ridge", batch_size=4, **given)
    probe.save_pretrained(tmp_path / "probe")
    loaded = Probe.from_pretrained(tmp_path / "probe", base=pipe)
    assert torch.equal(loaded(x).probabilities, probe(x).probabilities)
    if name == "sd":
        assert not torch.equal(probe(x, prompt="something else").probabilities, probe(x).probabilities)
        prompts = ["a", "b"] * 4
        torch.testing.assert_close(
            probe.logits(x, prompt=prompts)[1:2], probe.logits(x[1:2], prompt="b"), atol=1e-3, rtol=1e-3
        )


def test_digits():
    """The trained model of the examples, on real images: above 9 of 10 by one layer."""
    examples = Path(__file__).parents[2] / "examples"
    if not (examples / "models" / "digits-ddpm" / "model_index.json").is_file():
        pytest.skip("examples/models/digits-ddpm is not there")
    splits = load_digits_splits()
    denoiser = Denoiser.from_pretrained(examples / "models" / "digits-ddpm")
    settings = {"layers": ["mid_block"], "timestep": 50, "pooling": "adaptive:2", "protocol": "ridge"}
    probe = Probe.fit(denoiser, splits["train"], splits["validation"], **settings)
    assert probe.evaluate(splits["test"])["accuracy"] > 0.9
    assert probe(splits["test"][:3]["image"]).labels == [str(label) for label in splits["test"][:3]["label"]]


# Saving and loading


@pytest.mark.parametrize("head", ["linear", "mlp", "knn"])
def test_saved_probes_give_equal_probabilities(head, tmp_path):
    base = tmp_path / "base"
    pipeline().save_pretrained(base)
    probe = Probe.fit(Denoiser.from_pretrained(base), dataset(30), head=head, **SETTINGS)
    probe.save_pretrained(tmp_path / "probe")
    state = torch.get_rng_state()
    loaded = Probe.from_pretrained(tmp_path / "probe")
    assert torch.equal(torch.get_rng_state(), state)
    x = images(7, seed=4)[0]
    assert torch.equal(loaded(x).probabilities, probe(x).probabilities)
    assert loaded.recipe == ProbeRecipe.from_dict(json.loads(json.dumps(probe.recipe.to_dict())))
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == [
        "README.md",
        "config.json",
        f"diffusers_repr_{head}.py",
        "diffusion_pytorch_model.safetensors",
        "probe.json",
    ]
    loaded.save_pretrained(tmp_path / "probe")  # replaces a probe
    again = Probe.from_pretrained(tmp_path / "probe")
    assert torch.equal(again(x).probabilities, probe(x).probabilities)


def test_images_of_other_sizes_and_colours_are_brought_to_those_of_training():
    big = [p.resize((40, 24)).convert("RGB") for p in images(3, seed=4)[0]]
    assert fitted()(big).labels == NAMES
    assert fitted().recipe.image_size == (16, 16)
    assert repr(fitted()) == (
        "Probe(LinearHead, 3 classes, base=None, image_size=(16, 16),\n"
        "    layers=['mid_block', 'up_blocks.0'], timesteps=[50], pooling='adaptive:2')"
    )


def test_a_probe_is_fitted_at_the_models_own_size():
    pictures, labels = images(9)
    large = [picture.resize((30, 22)) for picture in pictures]
    assert Probe.fit(pipeline(), (large, labels), layers="mid_block", timestep=50).recipe.image_size == (16, 16)


def test_the_recipe_holds_what_the_answer_depends_on(tmp_path):
    probe = small(ensemble_size=2, seed=7, timestep=[10, 999], noise="shared", label_names=NAMES)
    probe.save_pretrained(tmp_path / "probe")
    data = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert data["base"]["model_class"] == "UNet2DModel"
    assert data["base"]["config"]["block_out_channels"] == [8, 16]
    assert not any(key.startswith("_") for key in data["base"]["config"])
    assert [level["requested"] for level in data["levels"]] == [{"timestep": 10.0}, {"timestep": 999.0}]
    assert (data["ensemble_size"], data["seed"], data["noise"]) == (2, 7, "shared")
    assert data["image_size"] == [16, 16]
    assert data["protocol"]["name"] == "ridge"
    assert data["protocol"]["version"] == 1
    assert data["protocol"]["chosen"]["l2"] in data["protocol"]["l2"]
    assert set(data["versions"]) == {"diffusers-repr", "diffusers", "torch", "transformers"}
    assert data["train"] == {"dataset": "images", "split": "train", "rows": 24}
    assert str(tmp_path) not in (tmp_path / "probe" / "config.json").read_text()


def test_infinite_noise_is_written():
    recipe = fitted().recipe
    level = dataclasses.replace(recipe.levels[0], nsr=math.inf)
    data = json.loads(json.dumps(dataclasses.replace(recipe, levels=(level,)).to_dict(), allow_nan=False))
    assert ProbeRecipe.from_dict(data).levels == (level,)


def test_the_card_has_the_scores_in_the_hubs_format(tmp_path):
    probe = copy.copy(fitted())
    probe.evaluate(images(60, seed=2), dataset="Sides")
    first = dict((s.name, s.value) for s in probe.recipe.scores if s.split == "test")
    probe.evaluate(images(60, seed=2), dataset="Sides")  # measured again: not twice in the card
    probe.save_pretrained(tmp_path / "sides")
    card = ModelCard.load(tmp_path / "sides" / "README.md")
    found = {(r.dataset_name, r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found[("Sides", "test", "accuracy")] == pytest.approx(first["accuracy"], rel=1e-5)
    assert found[("Sides", "test", "balanced_accuracy")] == pytest.approx(first["balanced_accuracy"], rel=1e-5)
    assert ("images", "validation", "accuracy") in found
    assert len(card.data.eval_results) == 3
    assert card.data.library_name == "diffusers-repr"
    assert card.data.pipeline_tag == "image-classification"
    for told in (
        "`mid_block`, `up_blocks.0`",
        "adaptive:2",
        "Protocol `lbfgs`, version 2",
        "| chosen l2 |",
        "# sides",
    ):
        assert told in card.content


def test_balanced_accuracy_is_the_mean_over_classes():
    probe = fitted()
    pictures, labels = images(12, seed=2)
    labels = [*labels[:9], 0, 0, 0]  # three wrong labels in a class of six
    scores = probe.evaluate((pictures, labels), record=False)
    guesses = [NAMES.index(name) for name in probe(pictures).labels]
    pairs = list(zip(guesses, labels, strict=True))
    each = [sum(g == y for g, y in pairs if y == c) / labels.count(c) for c in range(3)]
    assert scores["balanced_accuracy"] == pytest.approx(sum(each) / 3)
    assert scores["accuracy"] == pytest.approx(sum(g == y for g, y in pairs) / 12)


def test_a_relative_base_is_found_from_elsewhere(tmp_path, monkeypatch):
    project = tmp_path / "project"
    pipeline().save_pretrained(project / "models" / "base")
    monkeypatch.chdir(project)
    small(Denoiser.from_pretrained("models/base")).save_pretrained("outputs/probe")
    assert json.loads((project / "outputs/probe/probe.json").read_text())["base"]["name"] == "models/base"
    x = images(3)[0]
    here = Probe.from_pretrained("outputs/probe")(x).probabilities
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Probe.from_pretrained("project/outputs/probe")(x).probabilities, here)
    os.rename(project / "models", project / "gone")
    with pytest.raises(FileNotFoundError, match=r"was the folder 'models/base', which is not here.*Pass base="):
        Probe.from_pretrained("project/outputs/probe")
    assert torch.equal(Probe.from_pretrained("project/outputs/probe", project / "gone/base")(x).probabilities, here)
