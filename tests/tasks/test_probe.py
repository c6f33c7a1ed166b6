import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep import select_features
from diffusers_repr.tasks import Probe, ProbeRecipe, Score
from tests.tasks.planted import LAYERS, NAMES, dataset, fitted, images, pipeline
from tests.testers.models import CONDITIONS, build

SETTINGS = {"layers": LAYERS, "timestep": 50, "pooling": "adaptive:2"}


def small(source=None, **changes):
    """A probe that is quick to fit."""
    settings = {"layers": ["mid_block"], "timestep": 50, "protocol": "ridge", **changes}
    return Probe.fit(pipeline() if source is None else source, images(24), **settings)


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
    spec = importlib.util.spec_from_file_location("digits_of_the_examples", examples / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    splits = module.load_digits_splits()
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
    assert found[("Sides", "test", "accuracy")] == first["accuracy"]
    assert found[("Sides", "test", "balanced_accuracy")] == first["balanced_accuracy"]
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


# The wrong base


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes") / "probe"
    fitted().save_pretrained(folder)
    return folder


def test_another_class_is_refused(saved):
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; the probe was fitted on a UNet2DModel"):
        Probe.from_pretrained(saved, base=build("sd"))


def test_a_missing_layer_is_refused(tmp_path):
    probe = small(pipeline(layers_per_block=2), layers=["up_blocks.0.resnets.2"])
    probe.save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"has no layer 'up_blocks.0.resnets.2' \(closest: \['up_blocks.0.resnets"):
        Probe.from_pretrained(tmp_path / "deep", base=pipeline())


def test_other_channels_are_refused(saved):
    with pytest.raises(ValueError, match="gives 128 values at layer 'mid_block'; the probe was fitted on 64"):
        Probe.from_pretrained(saved, base=pipeline(block_out_channels=(16, 32)))


def test_another_config_with_the_same_features_warns(saved):
    with pytest.warns(UserWarning, match="other weights"), pytest.warns(UserWarning, match="in_channels is 3, was 1"):
        Probe.from_pretrained(saved, base=pipeline(in_channels=3, out_channels=3))


def test_other_weights_warn(saved, recwarn):
    with pytest.warns(UserWarning, match="has other weights than the probe's base"):
        Probe.from_pretrained(saved, base=pipeline(seed=1))
    recwarn.clear()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        Probe.from_pretrained(saved, base=pipeline().to(dtype))
    assert not [w for w in recwarn if "weights" in str(w.message)]


def test_another_noise_schedule_is_refused_and_another_sampler_is_not(saved):
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    Probe.from_pretrained(saved, base=pipe)
    pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="the noise schedules differ"):
        Probe.from_pretrained(saved, base=pipe)


def test_a_base_without_a_name_must_be_given(saved):
    with pytest.raises(ValueError, match="UNet2DModel that has no name.*base="):
        Probe.from_pretrained(saved)


def test_a_base_swapped_behind_the_probe_is_noticed():
    probe = small()
    probe.extractor = probe.recipe.extractor(Denoiser.from_pipe(pipeline(block_out_channels=(16, 32))))
    with pytest.raises(ValueError, match="gives 32 values at layer 'mid_block'; the probe was fitted on 16"):
        probe(images(2)[0])


# Damaged and wrong folders


def damage(folder, name, content):
    (folder / name).write_bytes(content((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("probe.json", lambda b: b[: len(b) // 2], ValueError, "probe.json.*is not valid JSON"),
        ("probe.json", lambda b: b"", ValueError, "is empty"),
        ("probe.json", lambda b: b"[1]", ValueError, "is no probe's recipe"),
        ("probe.json", lambda b: b.replace(b'"layers"', b'"layer"'), ValueError, "is damaged or was edited"),
        ("probe.json", lambda b: b.replace(b"probe/1", b"probe/9"), ValueError, "'diffusers_repr.probe/9'.*Upgrade"),
        ("probe.json", lambda b: b.replace(b'"right"', b'"right", "more"'), ValueError, "are of two probes"),
        ("config.json", lambda b: b[:20], ValueError, "config.json"),
        ("config.json", lambda b: b.replace(b"LinearHead", b"OtherHead"), ValueError, "class 'OtherHead'"),
        ("config.json", lambda b: b.replace(b": 128", b": 127"), ValueError, "damaged or do not fit each other"),
        (
            "diffusion_pytorch_model.safetensors",
            lambda b: b[: len(b) // 2],
            ValueError,
            "weights or the config in .* are damaged",
        ),
        ("diffusion_pytorch_model.safetensors", lambda b: b"", ValueError, "are damaged"),
        ("diffusion_pytorch_model.safetensors", lambda b: b"x" * 999, ValueError, "are damaged"),
    ],
)
def test_damaged_files(name, content, error, message, tmp_path):
    fitted().save_pretrained(tmp_path / "probe")
    damage(tmp_path / "probe", name, content)
    with pytest.raises(error, match=message):
        Probe.from_pretrained(tmp_path / "probe", base=pipeline())


def test_missing_files(tmp_path):
    fitted().save_pretrained(tmp_path / "probe")
    (tmp_path / "probe" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        Probe.from_pretrained(tmp_path / "probe", base=pipeline())
    (tmp_path / "probe" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Probe.from_pretrained(tmp_path / "probe", base=pipeline())


def test_folders_that_are_no_probe(tmp_path):
    pipeline().save_pretrained(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="has no probe.json; it is a pipeline: pass it as base="):
        Probe.from_pretrained(tmp_path / "pipe")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is a store of features"):
        Probe.from_pretrained(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Probe.from_pretrained("./nowhere")


def test_saving_does_not_replace_what_is_no_probe(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image.png").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="holds no probe"):
        fitted().save_pretrained(tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["image.png"]

    fitted().save_pretrained(tmp_path / "probe")
    before = {p.name: p.read_bytes() for p in (tmp_path / "probe").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_repr.tasks.probe_files.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        small().save_pretrained(tmp_path / "probe")
    assert {p.name: p.read_bytes() for p in (tmp_path / "probe").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "probe"]


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": None}, ValueError, r"Pass layers=\.\.\., or selection="),
        ({"timestep": None}, ValueError, r"Pass timestep=\.\.\."),
        ({"layers": ["mid_blok"]}, ValueError, "No layer 'mid_blok'.*Closest"),
        ({"layers": [3]}, TypeError, "never by an index"),
        ({"timestep": 5000}, ValueError, "5000"),
        ({"head": "tree"}, ValueError, "expected one of knn, linear, mlp"),
        ({"protocol": "sgd"}, ValueError, "expected one of lbfgs"),
        ({"label_names": ["a", "b"]}, ValueError, "class ids run from 0 to 1"),
        ({"label_names": ["a", "a", "b"]}, ValueError, "must differ"),
        ({"prompt": "a photo"}, ValueError, "takes no prompt"),
        ({"pooling": "sum"}, ValueError, "Unknown pooling"),
        ({"colour": 3}, TypeError, "colour"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)


def bad_data():
    pictures, labels = images(6)
    nan = torch.rand(2, 1, 16, 16)
    nan[1, 0, 3, 3] = math.nan
    columns = {"image": [*pictures[:4], None, pictures[5]], "label": labels}
    no_image = Dataset.from_dict(columns, features=dataset(6).features)
    return {
        "empty": (([], []), ValueError, "has no images"),
        "counts": ((pictures, labels[:5]), ValueError, "6 images and 5 labels"),
        "floats": ((pictures, [0.5] * 6), ValueError, "one whole-number class id per image"),
        "negative": ((pictures, [-1, 0, 1] * 2), ValueError, "run from -1 to 1"),
        "huge": ((pictures, [0, 10**9, 1] * 2), ValueError, "run to 1000000000; class ids are numbered"),
        "one class": ((pictures, [0] * 6), ValueError, "a classifier needs two classes"),
        "nan": ((nan, [0, 1]), ValueError, "NaN"),
        "sizes": (([pictures[0], Image.new("L", (20, 20))], [0, 1]), ValueError, "mixed sizes"),
        "no tuple": (pictures, TypeError, "tuple .images, labels."),
        "no image": (no_image, ValueError, "Row 4 of .* has no image"),
        "no labels": (dataset(6).remove_columns("label"), ValueError, "no label column"),
    }


@pytest.mark.parametrize("case", bad_data())
def test_bad_data(case):
    data, error, message = bad_data()[case]
    with pytest.raises(error, match=message):
        Probe.fit(pipeline(), data, layers="mid_block", timestep=50)


def test_sizes_that_change_between_batches():
    pictures, labels = images(8)
    pictures[6] = pictures[6].resize((32, 32))
    pictures[7] = pictures[7].resize((32, 32))
    with pytest.raises(ValueError, match=re.escape("is (32, 32) (H, W), those before it are (16, 16)")):
        Probe.fit(pipeline(), (pictures, labels), layers="mid_block", timestep=50, batch_size=2)
    probe = Probe.fit(pipeline(), (pictures, labels), layers="mid_block", timestep=50, batch_size=2, image_size=16)
    assert probe.recipe.image_size == (16, 16)


def test_other_classes_are_refused():
    renamed = dataset(6).cast_column("label", dataset(6).features["label"].__class__(names=["dark", "right", "left"]))
    with pytest.raises(ValueError, match=r"has the classes \['dark', 'right', 'left'\]; the probe has"):
        fitted().evaluate(renamed, record=False)
    with pytest.raises(ValueError, match="class ids run from 0 to 2"):
        fitted().evaluate((images(2)[0], [0, 3]), record=False)


def test_maps_and_double_orders_are_refused():
    extractor = FeatureExtractor(Denoiser.from_pipe(pipeline()), "mid_block", 50)
    with pytest.raises(ValueError, match="pooling=None leaves maps"):
        Probe.fit(extractor, images(6))


def test_scores_of_one_place_are_replaced():
    recipe = fitted().recipe.with_scores([Score("accuracy", 0.1, "images", "validation", 30)])
    assert [s.value for s in recipe.scores] == [0.1]


def test_to_moves_base_and_head():
    probe = small().to("cpu")
    assert probe.head.mean.device.type == "cpu"
    assert "LinearHead" in repr(probe)


def test_fresh_noise_is_not_the_same_in_both_splits(monkeypatch):
    import diffusers_repr.tasks.probe_fit as module

    seen, fit = {}, module.fit_head

    def spy(features, targets, *args, validation, **kwargs):
        seen.update(train=features, validation=validation[0])
        return fit(features, targets, *args, validation=validation, **kwargs)

    monkeypatch.setattr(module, "fit_head", spy)
    monkeypatch.setattr(module, "tell_overlap", lambda *_: 0)
    data = images(24)
    again = (list(data[0]), list(data[1]))
    for noise, equal in (("per_image", True), ("fresh", False)):
        Probe.fit(pipeline(), data, again, layers=["mid_block"], timestep=300, protocol="ridge", noise=noise)
        assert torch.allclose(seen["train"], seen["validation"], atol=1e-5) == equal
