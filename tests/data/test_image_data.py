"""Data sets of images: what opens, and what each mistake is told."""

import io
import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from diffusers_repr.data.image_data import from_dataset, load_images
from diffusers_repr.data.splits import has_split


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 6, 3), dtype=np.uint8))


def labelled(count=5, **columns):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [picture(i) for i in range(count)], "label": [i % 2 for i in range(count)]}
    data = Dataset.from_dict(rows, features=features)
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def test_folder_of_images(tmp_path):
    for name, count in (("cat", 2), ("dog", 3)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(tmp_path / "images" / name / f"{i}.png")
    data = load_images(str(tmp_path / "images"))
    assert (len(data), data.label_names, data.labels()) == (5, ["cat", "dog"], [0, 0, 1, 1, 1])
    images, labels = next(data.batches(3, start=1))
    assert [image.size for image in images] == [(6, 8)] * 3
    assert labels == [0, 1, 1]


def test_parquet_file_and_folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        labelled(3 if split == "train" else 2).to_parquet(folder / f"{split}.parquet")
    assert len(load_images(str(folder), "test")) == 2
    alone = load_images(str(folder / "train.parquet"))
    assert (alone.labels(), alone.label_names) == ([0, 1, 0], ["cat", "dog"])
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test|it has test, train"):
        load_images(str(folder), "validation")


def test_save_to_disk(tmp_path):
    labelled().save_to_disk(tmp_path / "one")
    DatasetDict({"a": labelled(2)}).save_to_disk(tmp_path / "dict")
    assert len(load_images(str(tmp_path / "one"))) == 5
    assert len(load_images(str(tmp_path / "dict"), "a")) == 2
    with pytest.raises(ValueError, match="no split 'train'; it has a"):
        load_images(str(tmp_path / "dict"))


def test_which_splits_there_are(tmp_path):
    labelled().save_to_disk(tmp_path / "one")
    DatasetDict({"train": labelled(2), "test": labelled(2)}).save_to_disk(tmp_path / "dict")
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        labelled(2).to_parquet(tmp_path / "set" / f"{split}.parquet")
    (tmp_path / "edm" / "test" / "00000").mkdir(parents=True)
    picture(0).save(tmp_path / "edm" / "test" / "00000" / "img00000000.png")
    (tmp_path / "edm" / "test" / "dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 0]]}))
    found = {
        name: [split for split in ("train", "validation", "test") if has_split(str(place), split)]
        for name, place in {"digits": "digits", "file": tmp_path / "set" / "train.parquet", **{
            name: tmp_path / name for name in ("one", "dict", "set")}}.items()
    }  # fmt: skip
    assert found == {
        "digits": ["train", "validation", "test"],
        "file": [],  # these two answer to every name
        "one": [],
        "dict": ["train", "test"],
        "set": ["train", "validation"],
    }
    assert has_split(str(tmp_path / "edm"), "test")
    with pytest.raises(FileNotFoundError, match="Could not open .*nowhere"):
        has_split(str(tmp_path / "nowhere"), "test")


def test_batches_and_select():
    data = from_dataset(labelled(7))
    sizes = [(len(images), labels) for images, labels in data.batches(3)]
    assert sizes == [(3, [0, 1, 0]), (3, [1, 0, 1]), (1, [0])]
    assert [len(images) for images, _ in data.batches(2, 2, 5)] == [2, 1]
    assert data.select([6, 1]).labels() == [0, 1]


def test_it_is_shown_in_two_lines():
    assert repr(from_dataset(labelled(), name="pets")) == (
        "ImageData('pets', split 'train': 5 images, 2 classes ('cat', 'dog'),\n"
        "    columns: image='image', label='label')"
    )
    plain = from_dataset(labelled(2).remove_columns("label"), name="pets")
    assert repr(plain).startswith("ImageData('pets', split 'train': 2 images, no names of classes,\n")


def test_only_the_needed_columns_are_read():
    data = from_dataset(labelled(2, caption=["a", "b"]))
    assert data.dataset.column_names == ["image", "label"]


def test_columns_are_found_or_named():
    plain = labelled(2).rename_columns({"image": "photo", "label": "kind"})
    assert (from_dataset(plain).image_column, from_dataset(plain).label_column) == ("photo", "kind")
    without = plain.remove_columns("kind")
    data = from_dataset(without)
    assert data.label_column is None
    assert next(data.batches(2))[1] is None
    with pytest.raises(ValueError, match=r"no label column"):
        data.labels()
    numbers = without.add_column("label", [4, 9])
    assert from_dataset(numbers).labels() == [4, 9]
    assert from_dataset(numbers).label_names is None


@pytest.mark.parametrize(
    ("column", "values", "held"),
    [
        ("label", ["cat", "dog"], "texts"),
        ("category", [0.0, 1.0], r"numbers with fractions \(float64\)"),
        ("labels", [True, False], "true and false"),
    ],
)
def test_labels_that_are_no_class_ids(column, values, held):
    """The advice, followed, gives class ids; images alone can still be read."""
    words = labelled(4).remove_columns("label").add_column(column, values * 2)
    data = from_dataset(words, name="pets")
    assert len(next(data.batches(4))[0]) == 4
    line = rf"`dataset = dataset.class_encode_column\('{column}'\)`"
    told = rf"Column '{column}' of pets holds {held}, not class ids. {line}"
    with pytest.raises(ValueError, match=told):
        data.labels()
    with pytest.raises(ValueError, match=told):
        from_dataset(words, label_column=column, name="pets")
    encoded = from_dataset(words.class_encode_column(column))
    assert [encoded.label_names[label] for label in encoded.labels()] == [str(value) for value in values * 2]


def test_columns_that_may_be_meant_are_named():
    plain = labelled(2).remove_columns("label")
    for column, values, told in (
        ("breed", ["a", "b"], "If 'breed' holds the classes, .*class_encode_column.*save_to_disk"),
        ("kind", [4, 9], "Whole numbers are in 'kind'; name one by label_column"),
        ("size", [0.5, 0.7], r"its columns are \['image', 'size'\]. In a folder of images"),
    ):
        with pytest.raises(ValueError, match=told):
            from_dataset(plain.add_column(column, values)).labels()


def twice(data):
    return datasets.concatenate_datasets([data, data.select_columns("image").rename_column("image", "again")], axis=1)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda d: d, {"image_column": "photo"}, r"no column 'photo'; columns are \['image', 'label'\]"),
        (lambda d: d, {"image_column": "label"}, "not images; images: \\['image'\\]"),
        (lambda d: d, {"label_column": "kind"}, "no column 'kind'"),
        (lambda d: d, {"label_column": "image"}, "not class ids"),
        (lambda d: d.remove_columns("image"), {}, r"no column of images; its columns are \['label'\].*cast_column"),
        (twice, {}, r"several columns of images: \['image', 'again'\].*image_column"),
        (lambda d: d.select([]), {}, "has no rows"),
        (lambda d: d.add_column("word", ["a"] * 5), {"label_column": "word"}, "class_encode_column"),
    ],
)
def test_columns_that_do_not_fit(change, settings, message):
    with pytest.raises(ValueError, match=message):
        from_dataset(change(labelled()), **settings)


def test_a_broken_or_missing_image_names_its_row():
    good = io.BytesIO()
    picture(0).save(good, "PNG")
    rows = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    data = from_dataset(Dataset.from_dict({"image": rows}, features=Features({"image": datasets.Image()})))
    with pytest.raises(ValueError, match="Row 1 of dataset.*cannot be read"):
        list(data.batches(2))
    holes = Dataset.from_dict({"image": [rows[0], None]}, features=Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="Row 1 of dataset.*no image"):
        list(from_dataset(holes).batches(2))
    gaps = Dataset.from_dict(
        {"image": [picture(0)] * 2, "label": [3, None]},
        features=Features({"image": datasets.Image(), "label": Value("int64")}),
    )
    with pytest.raises(ValueError, match="Row 1 of dataset.*no label"):
        list(from_dataset(gaps).batches(2))


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        load_images("./nowhere")
    with pytest.raises(FileNotFoundError, match="as a data set.*Hub id"):
        load_images("user/nowhere")
    with pytest.raises(ValueError, match="no revisions"):
        load_images(str(tmp_path), revision="main")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="as a data set"):
        load_images(str(tmp_path / "empty"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="no column of images"):
        load_images(str(tmp_path / "notes"))
    (tmp_path / "a.csv").write_text("x\n1")
    with pytest.raises(ValueError, match=r"a \.csv file"):
        load_images(str(tmp_path / "a.csv"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(FileNotFoundError, match="as a data set"):
        load_images(str(tmp_path / "broken.parquet"))
