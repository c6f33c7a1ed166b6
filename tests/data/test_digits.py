import hashlib
from collections import Counter

import numpy as np
import pytest
from datasets import DatasetDict, Image
from sklearn.datasets import load_digits

from diffusers_repr.data import load_images
from diffusers_repr.data.digits import SPLIT_SIZES, load_digits_splits, split_indices
from diffusers_repr.data.splits import open_split


@pytest.fixture(scope="module")
def splits() -> DatasetDict:
    return load_digits_splits()


def test_sizes_columns_and_labels(splits):
    assert {name: len(split) for name, split in splits.items()} == SPLIT_SIZES
    for split in splits.values():
        assert isinstance(split.features["image"], Image)
        assert split.features["label"].names == list("0123456789")
    image = splits["train"][0]["image"]
    assert image.format == "PNG"
    assert image.mode == "L"
    assert image.size == (8, 8)


def test_images_are_those_of_scikit_learn(splits):
    source = load_digits()
    indices = split_indices(source.target.tolist())
    for name, split in splits.items():
        expected = np.rint(source.images[indices[name]] * 255 / 16)
        np.testing.assert_array_equal(np.stack([np.asarray(image) for image in split["image"]]), expected)
        np.testing.assert_array_equal(split["label"], source.target[indices[name]])


def test_no_image_is_in_two_splits(splits):
    pixels = [image.tobytes() for split in splits.values() for image in split["image"]]
    assert len(pixels) == len(set(pixels)) == 1797


def test_splits_are_stratified(splits):
    totals = Counter(label for split in splits.values() for label in split["label"])
    for name, size in SPLIT_SIZES.items():
        counts = Counter(splits[name]["label"])
        for label, total in totals.items():
            assert abs(counts[label] - total * size / 1797) < 2, (name, label)


def test_splits_never_change():
    indices = split_indices(load_digits().target.tolist())
    digest = hashlib.sha256(repr(sorted(indices.items())).encode()).hexdigest()
    assert digest == "607504955f5611aaf040146ca2ca49433447ef0b978cfe7f7d8302ebeea28659"


def test_it_is_a_data_set_by_name(splits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_images("digits", "validation")
    assert data.labels() == list(splits["validation"]["label"])
    assert data.read([7])[0].tobytes() == splits["validation"][7]["image"].tobytes()
    streamed = next(iter(open_split("digits", "test", streaming=True)))
    assert streamed["label"] == splits["test"][0]["label"]
    for split, revision, message in (
        ("dev", None, "no split 'dev', only .*'validation'"),
        ("test", "a", "revision='a'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_split("digits", split, revision)
    (tmp_path / "digits").mkdir()
    with pytest.raises(ValueError, match=r"'\./digits' means the folder"):
        open_split("digits", "test")


def test_other_digits_are_refused():
    with pytest.raises(ValueError, match="1797"):
        split_indices([0, 1, 2])
