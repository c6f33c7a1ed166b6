"""Damaged folders of probes, and what a user may get wrong."""

import math
import re

import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.tasks import Probe, Score
from tests.tasks.planted import LAYERS, dataset, fitted, images, pipeline, small

SETTINGS = {"layers": LAYERS, "timestep": 50, "pooling": "adaptive:2"}


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

    monkeypatch.setattr("diffusers_repr.tasks.files.write_json", full)
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
        ({"head": "tree"}, ValueError, "expected one of .*, knn, linear, mlp"),
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
        "huge": ((pictures, [0, 10**9, 1] * 2), ValueError, "3 different class ids from 0 to 1000000000"),
        "sparse": ((pictures, [0, 1_000_000] * 3), ValueError, "1000001 classes, of which 999999 were empty"),
        "texts": ((pictures, ["cat", "dog"] * 3), ValueError, "are no numbers.*return_inverse"),
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
        Probe.fit(pipeline(), data, layers="mid_block", timestep=50, image_size="keep")


def test_sizes_that_change_between_batches():
    pictures, labels = images(8)
    pictures[6] = pictures[6].resize((32, 32))
    pictures[7] = pictures[7].resize((32, 32))
    with pytest.raises(ValueError, match=re.escape("is (32, 32) (H, W), those before it are (16, 16)")):
        Probe.fit(pipeline(), (pictures, labels), layers="mid_block", timestep=50, batch_size=2, image_size="keep")
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
