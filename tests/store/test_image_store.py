"""Stores of generated images: each key once, read as a data set, gone on with, and checked."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.store import ImageKey, ImageStore, not_yet_made, write_images

KEYS = [
    ImageKey("org/model", 6, 8, steps=4, seed=10 + row, prompt=f"pet {row % 2}", guidance="7.5", source=f"{row // 2}",
             variant=row % 2)
    for row in range(5)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pixels(key):
    return np.random.default_rng(key.seed).integers(0, 255, (key.height, key.width, 3), dtype=np.uint8)


def make(keys):
    return [Image.fromarray(pixels(key)) for key in keys]


def write(out, keys=KEYS, make=make, **settings):
    return write_images(out, keys, make, batch_size=2, shard_size=2, progress=False, **settings)


def test_a_data_set_of_images_with_their_keys(tmp_path):
    store = write(tmp_path / "out", about={"why": "augmentation"})
    store.verify()
    assert store.image_keys() == KEYS
    for rows in (store.load(), datasets.load_dataset(str(tmp_path / "out"), split="train")):
        assert rows["row"][:] == [0, 1, 2, 3, 4]
        assert (rows["source"][:], rows["variant"][:]) == (["0", "0", "1", "1", "2"], [0, 1, 0, 1, 0])
        for row, key in zip(rows, KEYS, strict=True):
            np.testing.assert_array_equal(np.asarray(row["image"]), pixels(key))
            assert (row["prompt"], row["revision"], row["guidance"]) == (key.prompt, None, "7.5")
    assert plan_upload(tmp_path / "out").kind == ImageStore.noun
    assert json.loads((tmp_path / "out/manifest.json").read_text())["about"] == {"why": "augmentation"}


def test_no_variant_is_made_twice(tmp_path):
    with pytest.raises(ValueError, match="seed=11.*stands 2 times"):
        write(tmp_path / "out", [*KEYS, KEYS[1]])
    store, made = write(tmp_path / "out", KEYS[:3]), []
    wanted = not_yet_made([*KEYS, replace(KEYS[0], seed=99), KEYS[4]], [store])
    assert wanted == [*KEYS[3:], replace(KEYS[0], seed=99)]
    write(tmp_path / "out", KEYS[:3], lambda keys: made.extend(keys) or make(keys))
    assert made == []  # a whole store is left as it is
    (tmp_path / "out/data/train-00001-of-00002.parquet").unlink()
    write(tmp_path / "out", KEYS[:3], lambda keys: made.extend(keys) or make(keys))
    assert made == [KEYS[2]]
    with pytest.raises(FileExistsError, match="another recipe.*keys.*models.org/model@: 3 -> 5"):
        write(tmp_path / "out")


@pytest.mark.parametrize("field", ["height", "steps", "seed", "variant", "prompt"])
def test_keys_differ_in_every_field(field):
    other = replace(KEYS[0], **{field: "other" if field == "prompt" else getattr(KEYS[0], field) + 1})
    assert other.name != KEYS[0].name
    with pytest.raises(ValueError, match=field):
        replace(KEYS[0], **{field: -1})


def test_what_a_store_of_images_is_not(tmp_path):
    with pytest.raises(ValueError, match="seed=10.* came as 8 x 6"):
        write(tmp_path / "out", make=lambda keys: [image.rotate(90, expand=True) for image in make(keys)])
    with pytest.raises(ValueError, match="No keys"):
        write(tmp_path / "none", [])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        write_images(tmp_path / "none", KEYS, make, batch_size=0)
    for name in ("model", "source", "condition"):  # it would be published with the store
        with pytest.raises(ValueError, match=f"The {name} of a key is a place.*such as 'cats'"):
            write(tmp_path / "none", [replace(KEYS[0], **{name: "/data/me/cats"})])
    path = write(tmp_path / "out").folder / "data/train-00001-of-00003.parquet"
    good = pq.read_table(path)
    jpeg = [{"bytes": b"\xff\xd8 no png", "path": None}] * 2
    for column, values, message in (
        ("seed", [12, 77], "another key in row 3"),
        ("image", jpeg, "no PNG of 6 x 8 .H x W. in row 2"),
    ):
        at = good.column_names.index(column)
        field = good.schema.field(at)
        changed = good.set_column(at, field, pa.array(values, field.type))
        pq.write_table(changed, path)
        with pytest.raises(ValueError, match=rf"00001-of-00003\.parquet' holds {message}"):
            ImageStore.open(tmp_path / "out").verify()
    paths = pa.array([{"bytes": None, "path": "/etc/hostname"}] * 2, good.schema.field("image").type)
    pq.write_table(good.set_column(good.column_names.index("image"), good.schema.field("image"), paths), path)
    for read in (ImageStore.open(tmp_path / "out").load, ImageStore.open(tmp_path / "out").verify):
        with pytest.raises(ValueError, match="00001-of-00003.parquet' holds a path in place of a picture"):
            read()
