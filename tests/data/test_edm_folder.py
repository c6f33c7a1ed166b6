"""Preprocessed data of EDM and REPA: the shards are no classes."""

import json
import warnings

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_repr.data.image_data import load_images
from diffusers_repr.data.splits import open_split


def write(folder, labels, shard=2, name="img{:08d}.png", written=True):
    """Images whose grey value is their number, `shard` in a folder, and their labels."""
    pairs = []
    for at, label in enumerate(labels):
        file = f"{at // shard:05d}/{name.format(at)}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), at, np.uint8)).save(folder / file)
        pairs.append([file, label])
    if written:
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return pairs


LABELS = [3, 0, 0, 1, 3]


def check(data, labels=LABELS):
    assert data.labels() == labels
    assert [image.getpixel((0, 0))[0] for (image,) in zip(data.dataset["image"])] == list(range(len(labels)))
    assert data.label_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("place", ["", "images", "train", "train/images"])
def test_classes_are_those_of_the_file(tmp_path, place):
    """Given the folder of the shards, that of REPA around it, or one with splits."""
    write(tmp_path / place, LABELS)
    check(load_images(str(tmp_path)))
    (row,) = open_split(str(tmp_path), "train", streaming=True).take(1)
    assert row["label"] == 3
    with pytest.raises(ValueError, match="has no split 'test'|pass '.*train"):
        load_images(str(tmp_path), "test")


def test_repas_own_place_of_the_labels(tmp_path):
    """Its code reads them beside the latents."""
    pairs = write(tmp_path / "images", LABELS, written=False)
    named = [[name.replace("img", "img-mean-std-").replace(".png", ".npy"), label] for name, label in pairs]
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": named}))
    check(load_images(str(tmp_path)))


def test_without_classes(tmp_path):
    write(tmp_path / "null", LABELS)
    (tmp_path / "null" / "dataset.json").write_text('{"labels": null}')
    write(tmp_path / "none", LABELS, written=False)
    for name in ("null", "none"):
        data = load_images(str(tmp_path / name))
        assert (len(data), data.label_column) == (5, None)


def test_folders_that_are_the_classes_give_their_names(tmp_path):
    pairs = write(tmp_path, [2, 2, 0, 0], name="a{}.png")
    for old, new in (("00000", "dog"), ("00001", "cat")):
        (tmp_path / old).rename(tmp_path / new)
        pairs = [[name.replace(old, new), label] for name, label in pairs]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    data = load_images(str(tmp_path))
    assert (data.labels(), data.label_names) == ([0, 0, 2, 2], ["cat", "1", "dog"])
    pairs[0][1] = 0
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    with pytest.raises(ValueError, match=r"are not the folders of the images.* Take dataset\.json out of the folder"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["00000/img00000000.png", 1]], r"lacks 1 of 2 images, the first is '00000/img00000001\.png'"),
        ([["00000/img00000000.png", 1], ["00000/img00000001.png", 1], ["../../x.png", 0]], r"names 1 .*'\.\./\.\./x"),
        ([["00000/img00000000.png", 1], ["00000/img00000000.png", 1]], "twice"),
        ([["00000/img00000000.png", [0.5, 0.5]]], "Vectors as labels"),
        ([["00000/img00000000.png", -1]], "whole number from 0"),
        ([["00000/img00000000.png", 10**9], ["00000/img00000001.png", 0]], "1000000000.* from 0 to 999999"),
        ({"00000/img00000000.png": 1}, "expected .file name, class."),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, labels, message):
    write(tmp_path, [0, 0])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path))


def test_other_places(tmp_path):
    write(tmp_path / "some" / "cifar", LABELS)
    with pytest.raises(ValueError, match=r"'cifar' in it has one.*pass '.*cifar'"):
        load_images(str(tmp_path / "some"))
    (tmp_path / "latents" / "00000").mkdir(parents=True)
    np.save(tmp_path / "latents" / "00000" / "img-mean-std-00000000.npy", np.zeros((8, 2, 2)))
    (tmp_path / "latents" / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(ValueError, match="no images, but latents: pass the folder around it"):
        load_images(str(tmp_path / "latents"))
    (tmp_path / "some" / "cifar" / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json.* is not valid JSON"):
        load_images(str(tmp_path / "some" / "cifar"))


def test_a_file_of_another_meaning_is_none_of_ours(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path, [0], name=name + "{}.png", written=False)
        (tmp_path / "00000").rename(tmp_path / name)
    (tmp_path / "dataset.json").write_text('{"title": "animals"}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = datasets.load_dataset(str(tmp_path))["train"]
    assert load_images(str(tmp_path)).labels() == wanted["label"]
