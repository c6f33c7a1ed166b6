"""What selection accepts and refuses, and that no test data is read."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.sweep import hold_out, select_features
from tests.sweep.selection_models import Rows, planted, striped

BASE = {"timesteps": [10], "progress": False, "seeds": (0,), "max_layers": 1, "max_levels": 1}


def rows(count, seed=0, split=None, labels=None):
    images, own = striped(count, seed)
    pictures = [Image.fromarray((255 * image[0].numpy()).astype(np.uint8)) for image in images]
    columns = {"image": pictures, "label": own.tolist() if labels is None else labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(4)})
    return datasets.Dataset.from_dict(columns, features=features, split=split)


@pytest.fixture(scope="module")
def model():
    return planted(noise=Rows((4, 5)), signal=Rows((0, 2)))


@pytest.fixture(scope="module")
def data():
    return striped(32, 0), striped(24, 1)


def test_data_sets_image_data_and_pairs_give_the_same(model):
    train, held = rows(40), rows(24, 1)
    plain = select_features(model, train, held, **BASE)
    as_data = select_features(model, from_dataset(train), from_dataset(held, split="validation"), **BASE)
    pairs = [(list(d["image"]), list(d["label"])) for d in (train, held)]
    assert [c.score for c in plain.cells] == [c.score for c in as_data.cells]
    assert [c.score for c in plain.cells] == [c.score for c in select_features(model, *pairs, **BASE).cells]
    assert plain.recipe["classes"] == [0, 1, 2, 3]


def test_label_ids_need_not_start_at_zero(model, data):
    (images, labels), (held, held_labels) = data
    shifted = select_features(model, (images, 10 * labels + 3), (held, 10 * held_labels + 3), **BASE)
    assert shifted.best.score == select_features(model, *data, **BASE).best.score
    assert shifted.recipe["classes"] == [3, 13, 23, 33]


@pytest.mark.parametrize("split", ["test", "test[:50%]", "train+test", "my_test", "Testing"])
def test_a_test_split_is_refused(model, split):
    held = from_dataset(rows(24, 1), split=split)
    for pair in ((rows(24), held), (held, rows(24))):
        with pytest.raises(ValueError, match="test data"):
            select_features(model, *pair, **BASE)
    with pytest.raises(ValueError, match="test data"):
        hold_out(held)


@pytest.mark.parametrize("split", ["train", "validation", "latest", "contest_winners"])
def test_other_names_are_no_test_split(model, split):
    select_features(model, rows(24), from_dataset(rows(24, 1), split=split), **BASE)


def test_the_split_a_data_set_was_loaded_as_counts(model):
    with pytest.raises(ValueError, match="test data"):
        select_features(model, rows(24), rows(24, 1, split=datasets.Split.TEST), **BASE)


def test_a_dictionary_of_splits_is_refused_whole(model):
    both = datasets.DatasetDict({"train": rows(24), "test": rows(24, 1)})
    with pytest.raises(TypeError, match=r"data\['train'\]"):
        select_features(model, both, both, **BASE)


def test_the_fit_is_not_scored_on_itself(model, data):
    train = rows(24)
    for same in ((train, train), (from_dataset(train), train), (data[0], data[0])):
        with pytest.raises(ValueError, match="same rows"):
            select_features(model, *same, **BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(32, dtype=torch.long)}, "single class"),
        ({"labels": torch.arange(32)}, "one image"),
        ({"labels": torch.arange(32) % 4 - 1}, "missing labels"),
        ({"labels": torch.rand(32)}, "whole-number class id"),
        ({"labels": [None] * 32}, "missing"),
        ({"labels": ["a"] * 32}, "no numbers"),
        ({"labels": [0, 1]}, "32 images and 2 labels"),
        ({"labels": [], "images": []}, "no images"),
        ({"labels": torch.arange(32) % 3}, r"classes \[3\]"),
    ],
)
def test_unusable_labels(model, data, change, message):
    train = (change.get("images", data[0][0]), change["labels"])
    with pytest.raises(ValueError, match=message):
        select_features(model, train, data[1], **BASE)


def test_a_data_set_without_labels(model):
    with pytest.raises(ValueError, match="no label column; its columns are"):
        select_features(model, rows(24).remove_columns("label"), rows(24, 1), **BASE)


def test_too_few_rows_to_score_on(model, data):
    with pytest.raises(ValueError, match="Too few rows"):
        select_features(model, data[0], (data[1][0][:1], data[1][1][:1]), **BASE)


@pytest.mark.parametrize("train", [3, "folder", (1, 2, 3), torch.zeros(4, 1, 8, 8)])
def test_no_split_at_all(model, data, train):
    with pytest.raises(TypeError, match="train must be"):
        select_features(model, train, data[1], **BASE)


def test_hold_out_is_fixed_disjoint_and_stratified():
    whole = from_dataset(rows(100))
    train, held = hold_out(whole, 0.2)
    assert (len(train), len(held)) == (80, 20)
    assert sorted(np.bincount(held.labels())) == [5, 5, 5, 5]
    again = hold_out(whole, 0.2)[1]
    first, second = ([np.asarray(i).tobytes() for i in part.dataset["image"]] for part in (held, again))
    assert first == second
    assert not set(first) & {np.asarray(i).tobytes() for i in train.dataset["image"]}
    for fraction in (0.0, 1.0, -0.1, 0.001):
        with pytest.raises(ValueError, match=r"fraction"):
            hold_out(whole, fraction)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": ["signl"]}, ValueError, "Closest: .*signal"),
        ({"layers": [1]}, TypeError, "never by an index"),
        ({"timesteps": []}, ValueError, "empty"),
        ({"timesteps": 10}, TypeError, "list of levels"),
        ({"timesteps": [10, 10]}, ValueError, "twice"),
        ({"timesteps": [5000]}, ValueError, "outside"),
        ({"metric": "f1"}, ValueError, "accuracy"),
        ({"pooling": None}, ValueError, "pooling"),
        ({"pooling": "median"}, ValueError, "pooling"),
        ({"noise": "loud"}, ValueError, "per_image"),
        ({"noise": ("clean", "clean")}, ValueError, "once"),
        ({"criterion": "svm"}, ValueError, "ridge"),
        ({"seeds": ()}, ValueError, "seeds"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"finalists": True}, ValueError, "finalists"),
        ({"penalties": [0]}, ValueError, "penalties"),
        ({"prompt": ["a", "b"]}, TypeError, "one string"),
        ({"class_labels": [0, 1]}, TypeError, "one id for all images"),
        ({"prompt": "a digit"}, ValueError, "no prompt"),
    ],
)
def test_bad_settings(model, data, change, error, message):
    with pytest.raises(error, match=message):
        select_features(model, *data, **{**BASE, **change})


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_layer_that_gives_nan_is_named(data, fault):
    model = planted(good=Rows((0, 2)), broken=Rows((0, 2), fault=fault))
    with pytest.raises(FloatingPointError, match="'broken'.*timestep 10"):
        select_features(model, *data, **BASE)
    assert select_features(model, *data, layers=["good"], **BASE).best.layer == "good"


def test_nan_images_are_refused(model, data):
    images = data[0][0].clone()
    images[3] = float("nan")
    with pytest.raises(ValueError, match="Image 3 has NaN"):
        select_features(model, (images, data[0][1]), data[1], **BASE)


def test_shuffled_test_labels_change_nothing(model):
    splits = {"train": rows(40), "validation": rows(24, 1), "test": rows(24, 2)}
    first = select_features(model, splits["train"], splits["validation"], **BASE)
    splits["test"] = rows(24, 2, labels=[3 - value for value in splits["test"]["label"]])
    second = select_features(model, splits["train"], splits["validation"], **BASE)
    assert first == second
