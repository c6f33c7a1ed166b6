"""Masks and points as columns: every way to give them, what a batch carries, and what each mistake is told."""

import itertools
import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, List, Value
from PIL import Image
from torch.utils.data import default_collate

from diffusers_repr.data import DataConfig, load_images, load_train_data
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.data.placement import Placement
from tests.data.data_cases import picture
from tests.testers.hub_server import hub_env, hub_server, run_python

SIZE, NAMES = (8, 12), ["sky", "sea", "land"]
POINTS = [[[2, 3], [9, 7]], [[4.5, 0.5]], []]
KEPT = {"mask_column": "mask", "points_column": "points", "center_crop": "fit"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def mask(seed):
    ids = np.random.default_rng(seed).integers(0, 3, SIZE).astype(np.uint8)
    ids[0, seed] = 255
    return ids


def rows(masks=None, points=None, mask_feature=None, point_feature=None, count=3):
    masks = [Image.fromarray(mask(i)) for i in range(count)] if masks is None else masks
    columns = {"image": [picture(i, SIZE) for i in range(count)], "mask": masks, "points": points or POINTS[:count]}
    features = {
        "image": datasets.Image(),
        "mask": mask_feature or datasets.Image(),
        "points": point_feature or List(List(Value("float32"))),
    }
    return Dataset.from_dict(columns, features=Features(features))


def load(data=None, size=4, **settings):
    return load_train_data(DataConfig(**KEPT | settings), 3, size, rows() if data is None else data)


def test_a_batch_carries_them():
    data = load()
    batch = default_collate([data[i] for i in range(3)])
    assert (batch["masks"].shape, batch["masks"].dtype) == ((3, 4, 4), torch.int32)
    assert (batch["points"].shape, batch["visible"].dtype) == ((3, 2, 2), torch.bool)
    for i in range(3):  # the crop keeps columns 2 to 9, of which every second counts
        assert np.array_equal(batch["masks"][i].numpy(), mask(i)[1::2, 3:10:2])
    assert batch["points"][0].tolist() == [[-0.25, 1.25], [3.25, 3.25]]  # ((2 - 2 + 0.5) / 2 - 0.5, ...)
    assert batch["points"][1].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert batch["visible"].tolist() == [[True, True], [True, False], [False, False]]
    out = data.on_device(batch)
    assert out["masks"].dtype == torch.int64
    assert torch.equal(out["masks"], batch["masks"].long())
    assert (data.masks.names, data.masks.ignore_index) == (None, 255)


def test_off_the_crop_is_not_visible():
    data = load(rows(points=[[[1, 3, 1], [2, 3, 1], [2, 3, 0]], [[11, 7, 1]], None]))
    assert data[0]["visible"].tolist() == [False, True, False]  # column 1 is cut off; the last is not visible at all
    assert data[1]["visible"].tolist() == [False] * 3
    assert not data[2]["visible"].any()
    first = load(rows(points=[[[1, 3], [2, 3], [5, 3]], [], []]), max_points=2)
    assert first[0]["points"].shape == (2, 2)


def test_the_mirror_moves_all_three():
    data = load(size=8, random_flip=True)
    batch = default_collate([data[i] for i in range(2)] * 8)
    torch.manual_seed(0)
    mirrored = torch.rand(16) < 0.5
    torch.manual_seed(0)
    out = data.on_device(batch)
    assert 0 < mirrored.sum() < 16
    for b in range(16):
        ids = batch["masks"][b].long()
        assert torch.equal(out["masks"][b], ids.flip(-1) if mirrored[b] else ids)
        x, y = batch["points"][b, 0].tolist()
        assert out["points"][b, 0].tolist() == [7 - x if mirrored[b] else x, y]


def written(tmp_path):
    """The same rows as a folder with `metadata.jsonl`, and as Parquet."""
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = []
    for i in range(3):
        picture(i, SIZE).save(folder / f"{i}.png")
        Image.fromarray(mask(i)).save(folder / f"mask{i}.png")
        lines.append({"file_name": f"{i}.png", "mask_file_name": f"mask{i}.png", "points": POINTS[i]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows().to_parquet(tmp_path / "rows.parquet")
    return [str(tmp_path / "folder"), str(tmp_path / "rows.parquet")]


def test_folder_parquet_arrays_memory_and_stream_are_one(tmp_path):
    plain = load()
    names = List(List(ClassLabel(names=NAMES)))
    lists = [np.where(mask(i) == 255, -1, mask(i).astype(int)).tolist() for i in range(3)]
    forms = [load_train_data(DataConfig(dataset_name=path, **KEPT), 3, 4) for path in written(tmp_path)]
    forms.append(load(cache_images=True))
    forms.append(load(rows([m.tolist() for m in map(mask, range(3))], mask_feature=Array2D(SIZE, "uint8"))))
    three = [[[x, y, 1] for x, y in points] for points in POINTS]
    forms.append(load(rows(points=three, point_feature=Array2D((None, 3), "float32"))))
    named = load(rows(lists, mask_feature=names), ignore_index=-1)
    assert named.masks.names == NAMES
    whole = load(rows(lists, mask_feature=names), size=SIZE, ignore_index=-1)
    assert whole.on_device(default_collate([whole[1]]))["masks"][0, 0].tolist() == lists[1][0]
    for i in range(3):
        want = plain[i]
        for data in forms:
            assert all(torch.equal(data[i][key], want[key]) for key in want)
        ids = want["masks"]
        assert torch.equal(named[i]["masks"], torch.where(ids == 255, -1, ids))
    batch, joined = forms[2].batch([2, 0]), default_collate([plain[2], plain[0]])
    assert all(torch.equal(batch[key], joined[key]) for key in joined)
    stream = load(rows().to_iterable_dataset(), max_points=2, shuffle_buffer=1)
    for want, got in zip([plain[i] for i in range(3)], itertools.islice(stream, 3), strict=True):
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert load_train_data(
        DataConfig(dataset_name=written_stream(tmp_path), streaming=True, max_points=2, **KEPT), 3, 4
    )


def written_stream(tmp_path):
    return str(tmp_path / "rows.parquet")


HUB = """
import json, os
from huggingface_hub import HfApi
from diffusers_repr.data import DataConfig, load_images, load_train_data
HfApi().create_repo("user/boats", repo_type="dataset")
HfApi().upload_folder(folder_path=os.environ["FOLDER"], repo_id="user/boats", repo_type="dataset")
data = load_images("user/boats", mask_column="mask", points_column="points")
first = data.samples([0])[0]
train = load_train_data(DataConfig("user/boats", mask_column="mask", points_column="points", center_crop="fit"), 3, 4)
print(json.dumps([first.mask.tolist(), first.points.tolist(), train[0]["masks"].tolist()]))
"""


@pytest.mark.slow
def test_from_the_hub(tmp_path):
    folder = written(tmp_path)[0]
    with hub_server() as server:
        done = run_python(HUB, hub_env(server, tmp_path, FOLDER=folder))
    assert done.returncode == 0, done.stderr[-2000:]
    ids, points, cropped = json.loads(done.stdout.splitlines()[-1])
    assert (ids, points, cropped) == (mask(0).tolist(), POINTS[0], load()[0]["masks"].tolist())


def test_images_with_what_lies_on_them(tmp_path):
    path = written(tmp_path)[0]
    data = load_images(path, mask_column="mask", points_column="points", mask_names=NAMES)
    first, last = data.samples([0, 2])
    assert first.image.size == SIZE[::-1]
    assert np.array_equal(first.mask, mask(0))
    assert (first.points.tolist(), first.visible.tolist()) == (POINTS[0], [True, True])
    assert last.points.shape == (0, 2)
    assert data.masks.names == NAMES
    assert np.array_equal(data.select([2]).samples([0])[0].mask, mask(2))
    small = Placement.of(SIZE, (4, 6), "stretch")  # as `to_pixels` resizes
    assert np.array_equal(small.mask(first.mask), mask(0)[1::2, 1::2])
    with pytest.raises(ValueError, match="several columns of images.*mask_column"):
        load_images(path)
    with pytest.raises(ValueError, match="no mask_column"):
        from_dataset(rows(), "image", mask_names=NAMES)
    with pytest.raises(ValueError, match="transform"):
        from_dataset(rows().with_transform(dict), mask_column="mask").samples([0])
    words = rows().add_column("text", ["a", None, "c"])
    assert from_dataset(words, "image", caption_column="text").captions([1, 2]) == ["", "c"]
    with pytest.raises(ValueError, match="without texts"):
        data.captions([0])


def test_palettes_deep_masks_and_turned_files(tmp_path):
    palette = Image.fromarray(mask(0)).convert("P")
    palette.putdata(mask(0).ravel().tolist())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    deep = Image.fromarray(mask(1).astype(np.uint16) * 200)
    ids = load(rows([palette, deep, Image.fromarray(mask(2))]), size=SIZE, ignore_index=51000)
    assert np.array_equal(ids[0]["masks"].numpy(), mask(0))
    assert np.array_equal(ids[1]["masks"].numpy(), mask(1).astype(int) * 200)
    image, tags = picture(0, SIZE), Image.Exif()
    tags[274] = 6  # a quarter turn clockwise to be seen upright: points and arrays are of what is seen
    image.save(tmp_path / "turned.png", exif=tags)
    upright = np.rot90(mask(0), -1)
    data = Dataset.from_dict(
        {"image": [str(tmp_path / "turned.png")], "mask": [upright.tolist()], "points": [[[7, 11]]]},
        features=Features({**rows().features, "mask": Array2D((12, 8), "uint8")}),
    )
    sample = load(data, size=(12, 8))[0]
    assert np.array_equal(sample["masks"].numpy(), upright)
    assert sample["points"].tolist() == [[7.0, 11.0]]


SMALL = Image.fromarray(np.zeros((4, 4), np.uint8))
ONE = Image.fromarray(np.ones(SIZE, np.uint8))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"masks": [ONE, SMALL]}, {}, r"mask of row 1 is \(4, 4\) \(H, W\), its image \(8, 12\)"),
        ({"masks": [ONE, picture(0, SIZE)]}, {}, "mask of row 1 is an image of mode 'RGB', which shows colours"),
        ({"masks": [ONE, Image.fromarray(mask(0) * 0 + 9)]}, {"mask_names": NAMES}, "row 1 has the class 9 at x=0, y"),
        ({"masks": [ONE, None]}, {}, "mask of row 1 is missing"),
        ({"masks": [[[0]], [[1, 2], [3]]], "mask_feature": List(List(Value("int32")))}, {}, "row 1 is no rectangle"),
        (
            {"masks": [np.ones(SIZE, int).tolist(), (np.ones(SIZE, int) * -3).tolist()],
             "mask_feature": Array2D(SIZE, "int64")},
            {"max_points": 1}, "row 1 has the class -3 at x=0, y=0; classes are from 0 on",
        ),
        ({"points": [[], [[1, 2], [3, 11]]]}, {}, r"points of row 1: number 1 is \(x, y\) = \(3.0, 11.0\), outside"),
        ({"points": [[], [[1, float("nan")]]]}, {}, "points of row 1: number 0"),
        ({"points": [[], [[1, 2, 3, 4]]]}, {}, r"points of row 1 are no list of \[x, y\]"),
        ({"points": [[], [[1, 2], [3]]]}, {}, r"points of row 1 are no list of \[x, y\]"),
    ],
)  # fmt: skip
def test_the_row_is_named(change, settings, message):
    data = load(rows(**{"count": 2} | change), **settings)
    if "rectangle" not in message:
        assert "masks" in data[0]
    for read in (lambda: data[1], lambda: from_dataset(data.images.data, "image", **ROOM(settings)).samples([1])):
        with pytest.raises(ValueError, match=message.replace("row 1", "row 1( of dataset .*)?")):
            read()


def ROOM(settings):
    return {"mask_column": "mask", "points_column": "points", "mask_names": settings.get("mask_names")}


def test_a_mask_that_cannot_be_read_is_skipped_as_an_image_is():
    raw = rows().cast_column("mask", datasets.Image(decode=False)).to_list()
    raw[1]["mask"] = {"bytes": b"no image", "path": "mask1.png"}
    data = Dataset.from_list(raw, features=rows().features)
    with pytest.raises(UnreadableImage, match=r"mask of row 1 \(mask1.png\) cannot be read.*--bad_images skip"):
        load(data)[1]
    assert torch.equal(load(data, bad_images="skip")[1]["masks"], load()[2]["masks"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_column": "seg"}, "no column 'seg'"),
        ({"points_column": "spots"}, "no column 'spots'"),
        ({"mask_column": "points", "image_column": "image"}, "'points' .* not masks"),
        ({"points_column": "mask"}, "'mask' .* not points"),
        ({"image_column": "mask"}, "'mask' .* holds the masks"),
        ({"mask_names": NAMES, "ignore_index": 2}, "ignore_index=2 is the class 'land' of 3"),
        ({"mask_names": NAMES, "mask_column": None}, "`mask_names` is set, but no `mask_column`"),
        ({"max_points": 3, "points_column": None}, "`max_points` is set, but no `points_column`"),
        ({"max_points": 0}, "`max_points` must be positive"),
        ({"streaming": True}, "pass --max_points"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        load(**settings)


def test_the_fingerprint_knows_them():
    base = load().fingerprint()
    others = [rows([ONE] * 3), rows(points=[[[1, 1]], *POINTS[1:]])]
    assert all(load(other).fingerprint() != base for other in others)
    plain = load(image_column="image", mask_column=None, points_column=None).fingerprint()
    assert {key: value for key, value in base.items() if key not in ("masks", "points")} == plain
