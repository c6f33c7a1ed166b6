"""Training images: crops, modes, columns, bad rows, augmentation, fingerprints."""

import dataclasses
import logging

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from transformers import HfArgumentParser

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.transforms import adm_center_crop, as_mode, augment, draw_flips, fit_center_crop, to_unit
from tests.data.data_cases import NAMES, picture, rows, with_broken


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(data=None, channels=3, size=8, **settings):
    return load_train_data(DataConfig(**settings), channels, size, rows() if data is None else data)


# Crops and modes


def slow_adm_crop(image, size):
    """By the definition, with the halving as means of 2 x 2 pixels by hand where that is what the filter does."""
    array = np.asarray(image).astype(np.float64)
    while min(array.shape[:2]) >= 2 * size:
        height, width = array.shape[0] // 2, array.shape[1] // 2
        if array.shape[0] % 2 or array.shape[1] % 2:
            halved = Image.fromarray(array.astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
            array = np.asarray(halved).astype(np.float64)
            continue
        array = np.floor((array[:, 0::2] + array[:, 1::2]) / 2 + 0.5)  # PIL rounds after each direction
        array = np.floor((array[0::2] + array[1::2]) / 2 + 0.5)
    height, width = array.shape[:2]
    short = min(height, width)
    new = (round(width * (size / short)), round(height * (size / short)))
    array = np.asarray(Image.fromarray(array.astype(np.uint8)).resize(new, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    out = np.zeros((size, size, 3), np.uint8)
    for y in range(size):
        for x in range(size):
            out[y, x] = array[top + y, left + x]
    return out


@pytest.mark.parametrize(
    "shape", [(8, 8), (8, 9), (9, 8), (11, 30), (16, 16), (17, 33), (31, 16), (64, 40), (67, 101), (5, 7), (3, 3)]
)
def test_adm_crop_is_its_definition(shape):
    image = picture(1, shape)
    got = np.asarray(adm_center_crop(image, 8))
    assert got.shape == (8, 8, 3)
    assert np.array_equal(got, slow_adm_crop(image, 8))


def test_adm_crop_keeps_an_image_of_that_size_and_differs_from_fit():
    same = picture(0, (8, 8))
    assert np.array_equal(np.asarray(adm_center_crop(same, 8)), np.asarray(same))
    large = picture(0, (67, 101))
    assert not np.array_equal(np.asarray(adm_center_crop(large, 8)), np.asarray(fit_center_crop(large, (8, 8))))


def test_an_odd_remainder_leaves_its_pixel_right_and_below():
    array = np.zeros((8, 11, 3), np.uint8)
    array[:, 1] = 255  # the first column kept: (11 - 8) // 2 = 1
    assert np.asarray(adm_center_crop(Image.fromarray(array), 8))[:, 0].min() == 255


def test_modes():
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert deep.mode.startswith("I;16")
    assert np.asarray(as_mode(deep, 1)).tolist() == [[0, 1, 255]]
    assert np.asarray(as_mode(deep, 3)).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert np.asarray(as_mode(clear, 3)).tolist() == [[[255, 255, 255]]]
    assert np.asarray(as_mode(half, 3))[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)
    assert np.asarray(as_mode(Image.new("LA", (1, 1), (7, 255)), 1)).tolist() == [[7]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert np.asarray(as_mode(palette, 3)).tolist() == [[[10, 20, 30]]]
    palette.info["transparency"] = 0
    assert np.asarray(as_mode(palette, 3)).tolist() == [[[255, 255, 255]]]
    with pytest.raises(ValueError, match="mode 'F' has no known range"):
        as_mode(Image.new("F", (1, 1)), 1)
    with pytest.raises(ValueError, match="1 channel .* or 3"):
        as_mode(half, 4)


def test_exif_orientation(tmp_path):
    image = picture(0, (8, 16))
    tags = image.getexif()
    tags[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "0.png", exif=tags)
    data = load(datasets.load_dataset(str(tmp_path))["train"], size=(16, 8), center_crop="fit")
    assert np.array_equal(data[0]["pixel_values"].permute(1, 2, 0).numpy(), np.rot90(np.asarray(image), -1))


# Samples


@pytest.mark.parametrize("cache_images", [False, True])
def test_samples(cache_images):
    source = rows(captions=True)
    data = load(source, caption_column="text", cache_images=cache_images)
    assert len(data) == 11
    assert (data.num_classes, data.class_names) == (3, NAMES)
    sample = data[4]
    assert sample["pixel_values"].dtype == torch.uint8
    crop = np.asarray(adm_center_crop(source[4]["image"], 8))
    assert np.array_equal(sample["pixel_values"].permute(1, 2, 0).numpy(), crop)
    assert sample["class_labels"].dtype == sample["index"].dtype == torch.int64
    assert (int(sample["class_labels"]), int(sample["index"]), sample["caption"]) == (1, 4, "picture 4")
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["class_labels"].tolist() == [0, 1, 2]
    assert batch["caption"] == ["picture 0", "picture 1", "picture 2"]
    out = data.on_device(batch)
    torch.testing.assert_close(out["pixel_values"], batch["pixel_values"].float() / 127.5 - 1)
    assert batch["pixel_values"].dtype == torch.uint8
    with pytest.raises(IndexError):
        data[11]


@pytest.mark.parametrize("captions", [False, True])
def test_batches_from_memory_are_joined_samples(captions):
    source = with_broken(rows(captions=True), [5])
    settings = {"cache_images": True, "bad_images": "skip", "caption_column": "text" if captions else None}
    data, places = load(source, **settings), [10, 5, 0, 5]
    batch, joined = data.batch(places), default_collate([data[i] for i in places])
    assert batch.keys() == joined.keys()
    for key, value in joined.items():
        assert torch.equal(batch[key], value) if key != "caption" else batch[key] == value
    assert batch["index"].tolist() == [10, 6, 0, 6]
    assert batch["class_labels"].dtype == torch.int64
    assert not hasattr(load(rows()), "batch")


def test_grey_and_rectangles():
    assert load(channels=1, size=(6, 8), center_crop="fit")[0]["pixel_values"].shape == (1, 6, 8)
    with pytest.raises(ValueError, match="'adm' gives squares.*'fit'"):
        load(size=(6, 8))
    with pytest.raises(ValueError, match="in_channels=2"):
        load(channels=2)


def test_a_folder_parquet_and_memory_give_the_same(tmp_path):
    source = rows(6)
    for i, row in enumerate(source):
        folder = tmp_path / "folder" / NAMES[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    source.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "moved").mkdir()
    source.save_to_disk(str(tmp_path / "disk"))
    memory = load(source)
    for name in ("rows.parquet", "disk"):
        opened = load_train_data(DataConfig(dataset_name=str(tmp_path / name)), 3, 8)
        assert all(torch.equal(opened[i]["pixel_values"], memory[i]["pixel_values"]) for i in range(6))
        assert opened.fingerprint() == memory.fingerprint()
    folder = load_train_data(DataConfig(dataset_name=str(tmp_path / "folder")), 3, 8)
    assert folder.class_names == NAMES
    assert [int(folder[i]["class_labels"]) for i in range(6)] == [0, 0, 1, 1, 2, 2]  # a folder is in order of classes
    assert torch.equal(folder[2]["pixel_values"], memory[1]["pixel_values"])


def test_fingerprint_tells_what_the_data_are():
    base = load().fingerprint()
    assert base == load(random_flip=True, cache_images=True).fingerprint()
    for other in (
        load(rows(10)),
        load(size=6),
        load(channels=1),
        load(center_crop="fit"),
        load(label_column="none"),
        load(rows(captions=True), caption_column="text"),
    ):
        assert other.fingerprint() != base
    swapped = rows().to_list()
    swapped[0]["image"], swapped[1]["image"] = swapped[1]["image"], swapped[0]["image"]
    assert load(Dataset.from_list(swapped, features=rows().features)).fingerprint() != base


# Labels and columns


def test_missing_labels():
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    data = Dataset.from_dict({"image": [picture(i) for i in range(4)], "label": [0, None, 2, -1]}, features=features)
    with pytest.raises(ValueError, match="2 of 4 images have no class in 'label', the first is row 1.*missing_labels"):
        load(data)
    kept = load(data, missing_labels="keep")
    assert [int(kept[i]["class_labels"]) for i in range(4)] == [0, -1, 2, -1]
    without = load(data, label_column="none")
    assert "class_labels" not in without[0]
    assert (without.num_classes, without.class_names) == (0, None)


def test_whole_numbers_as_labels():
    features = Features({"image": datasets.Image(), "digit": datasets.Value("int64")})
    data = Dataset.from_dict({"image": [picture(i) for i in range(3)], "digit": [4, 0, 2]}, features=features)
    assert "class_labels" not in load(data)[0]  # a number is a class only where it is called so
    chosen = load(data, label_column="digit")
    assert (chosen.num_classes, chosen.class_names) == (5, ["0", "1", "2", "3", "4"])
    wrong = Dataset.from_dict({"image": [picture(0)], "digit": [-5]}, features=features)
    with pytest.raises(ValueError, match="Row 0 has the class -5 in 'digit'"):
        load(wrong, label_column="digit")
    wrong = Dataset.from_dict({"image": [picture(0)], "digit": [10**9]}, features=features)
    with pytest.raises(ValueError, match="Column 'digit': 1 different class ids from 1000000000 to 1000000000"):
        load(wrong, label_column="digit")


def test_classes_of_which_nearly_all_are_empty():
    features = Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for ids, refused in (([0, 1000], False), ([0, 1001], True), ([0, 1_000_000], True)):
        data = Dataset.from_dict({"image": [picture(0)] * 2, "label": ids}, features=features)
        if not refused:
            assert load(data).num_classes == ids[1] + 1
            continue
        with pytest.raises(ValueError, match=f"{ids[1] + 1} classes, of which {ids[1] - 1} were empty") as told:
            load(data)
        assert "class_encode_column" in str(told.value)
        assert load(data.class_encode_column("label")).class_names == [str(i) for i in ids]
    named = Dataset.from_dict({"image": [picture(0)] * 2, "label": [0, 1001]}, features=features)
    assert load(named.cast_column("label", ClassLabel(num_classes=1002))).num_classes == 1002
    none = Dataset.from_dict({"image": [picture(0)] * 2, "label": [None, None]}, features=features)
    with pytest.raises(ValueError, match="'label' has no class in any of 2 rows"):
        load(none, missing_labels="keep")


def test_labels_of_another_kind_are_not_passed_over():
    data = Dataset.from_dict({"image": [picture(0)], "label": ["cat"]}).cast_column("image", datasets.Image())
    for given in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match="'label' .* texts.*class_encode_column.*--label_column none"):
            load(given)
    assert "class_labels" not in load(data, label_column="none")[0]
    assert load(data, caption_column="label")[0]["caption"] == "cat"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"image_column": "label"}, "'label' .* not images"),
        ({"label_column": "kind"}, "no column 'kind'"),
        ({"label_column": "text"}, "'text' .* not class ids"),
        ({"caption_column": "label"}, "No column 'label' of texts"),
        ({"caption_column": "title"}, "No column 'title' of texts"),
        ({"streaming": True}, "given as a map-style data set"),
    ],
)
def test_wrong_columns(settings, message):
    with pytest.raises(ValueError, match=message):
        load(rows(captions=True), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_crop": "five"}, "adm, fit"),
        ({"bad_images": "ignore"}, "error, skip"),
        ({"missing_labels": "drop"}, "error, keep"),
        ({"random_shift": -0.1}, "not be negative"),
        ({"random_scale": 1.0}, "share below 1"),
        ({"resolution": 0}, "positive"),
        ({"shuffle_buffer": 0}, "at least 1"),
        ({"streaming": True, "cache_images": True}, "`streaming` .* cache_images"),
        ({"latents_dir": "x", "random_rotation": 3.0}, "random_rotation cannot act"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_size_and_data_set_must_be_known():
    with pytest.raises(ValueError, match="pass --resolution"):
        DataConfig().size()
    with pytest.raises(ValueError, match=r"`resolution` is 32, but the model takes \(16, 16\)"):
        DataConfig(resolution=32).size(16)
    assert DataConfig(resolution=32).size() == DataConfig().size(32) == (32, 32)
    with pytest.raises(ValueError, match="pass --dataset_name"):
        load_train_data(DataConfig(), 3, 8)
    with pytest.raises(FileNotFoundError):
        load_train_data(DataConfig(dataset_name="/nowhere/at/all"), 3, 8)


def test_the_settings_are_flags():
    parser = HfArgumentParser(DataConfig)
    given = ["--random_flip", "--center_crop", "fit", "--resolution", "32", "--random_shift", "0.1"]
    config = parser.parse_args_into_dataclasses(given)[0]
    assert config == DataConfig(random_flip=True, center_crop="fit", resolution=32, random_shift=0.1)
    assert all(field.metadata["help"] for field in dataclasses.fields(DataConfig))


# Images that cannot be read


def test_a_broken_image_is_named():
    data = load(with_broken(rows(), [5]))
    assert data[4]["index"] == 4
    with pytest.raises(UnreadableImage, match=r"row 5 \(photo5.png\) cannot be read: .*--bad_images skip"):
        data[5]
    empty = Dataset.from_dict({"image": [picture(0), None]}, features=Features({"image": datasets.Image()}))
    with pytest.raises(UnreadableImage, match="Row 1 has no image"):
        load(empty)[1]


@pytest.mark.parametrize("cache_images", [False, True])
def test_a_broken_image_is_skipped_and_told_once(caplog, cache_images):
    source = rows()
    with caplog.at_level(logging.WARNING):
        data = load(with_broken(source, [5, 6, 10]), bad_images="skip", cache_images=cache_images)
        for _ in range(2):
            for bad, stands in ((5, 7), (6, 7), (10, 0)):
                sample = data[bad]
                assert int(sample["index"]) == stands
                assert int(sample["class_labels"]) == stands % 3
                assert torch.equal(sample["pixel_values"], load(source)[stands]["pixel_values"])
    assert sorted(data.images.bad) == [5, 6, 10]
    assert sum("skipped" in record.message for record in caplog.records) == 3
    assert "row 6 (photo6.png)" in caplog.text


def test_nothing_but_broken_images():
    data = load(with_broken(rows(3), [0, 1, 2]), bad_images="skip")
    with pytest.raises(UnreadableImage, match="3 images in a row.*from row 1 on"):
        data[1]


# Augmentation


def test_flips_are_exact_and_of_the_documented_draw():
    pixels = to_unit(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8))
    torch.manual_seed(5)
    mirrored = torch.rand(32) < 0.5
    torch.manual_seed(5)
    out = augment(pixels, True, 0.0, 0.0, 0.0)
    assert 0 < mirrored.sum() < 32
    for i in range(32):
        assert torch.equal(out[i], pixels[i].flip(-1) if mirrored[i] else pixels[i])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(draw_flips(32, "cpu"), mirrored)
    assert torch.equal(torch.rand(1), after)  # nothing else was drawn


def test_flips_come_before_the_other_draws():
    pixels = torch.rand(16, 1, 8, 8) * 2 - 1
    torch.manual_seed(1)
    both = augment(pixels, True, 20.0, 0.1, 0.1)
    torch.manual_seed(1)
    torch.testing.assert_close(augment(augment(pixels, True, 0, 0, 0), False, 20.0, 0.1, 0.1), both)


def test_shift_is_a_share_of_the_side():
    """A white column on black, moved by whole pixels: it is found where the draw says."""
    image = torch.full((1, 1, 8, 8), -1.0).repeat(64, 1, 1, 1)
    image[..., 4] = 1
    torch.manual_seed(0)
    across = torch.rand(5, 64)[1] * 2 - 1
    torch.manual_seed(0)
    moved = augment(image, False, 0.0, 0.25, 0.0)
    weight = (moved[:, 0, 3] + 1) / 2  # a row in the middle: the others may have left the image
    centre = (weight * torch.arange(8.0)).sum(1) / weight.sum(1)
    torch.testing.assert_close(centre, 4 - across * 0.25 * 8, atol=1e-3, rtol=0)


def test_image_pixels_of_one_number_and_pair():
    data = rows()
    assert ImagePixels(data, "image", 3, 6, cache=False)[0].shape == (3, 6, 6)
    collated = default_collate([load(data)[i] for i in (0, 1)])
    assert collated["pixel_values"].shape == (2, 3, 8, 8)
