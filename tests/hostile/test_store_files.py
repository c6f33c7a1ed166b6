"""Feature stores and caches of others: one good one of each, changed in one place a case."""

import json
import math
import shutil
from dataclasses import asdict
from operator import methodcaller

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_repr.store import ImageKey, ImageStore, write_assignments, write_images
from diffusers_repr.store.card import store_card
from diffusers_repr.store.feature_layout import Column, FeatureLayout
from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.shards import write_shard
from diffusers_repr.store.tensor_cache import TensorCache
from diffusers_repr.store.tensors import INDEX, TensorLayout
from tests.hostile.corrupt import changed, sweep

ROWS, RECIPE = 5, "0123456789abcdef"
COLUMNS = (Column("mid@t7", "mid", 0, 7.0, (3,)), Column("up@t7", "up", 0, 7.0, (2, 4), (1, 2), 1))


def store_manifest(layout):
    features = {
        "layers": ["mid", "up"],
        "where": "output",
        "levels": [{"timestep": 7.0, "alpha": 0.9, "sigma": 0.4}],
        "noise": "per_image",
        "ensemble_size": 1,
        "pooling": None,
        "seed": 0,
        "image_size": [8, 8],
        "prompt": None,
        "class_label": None,
        "dtype": "float32",
    }
    data = {"name": "pets", "split": "train", "image_column": "image", "label_column": "label", "rows": ROWS}
    model = {"name": "m", "revision": None, "class": "UNet2DModel", "dtype": "float32", "weights": RECIPE}
    return {
        "format": 1,
        "complete": True,
        "recipe_hash": RECIPE,
        "rows": ROWS,
        "shard_size": layout.shard_size,
        "shards": layout.shards,
        "label": {"names": ["cat", "dog"]},
        "columns": [asdict(column) for column in layout.columns],
        "recipe": {"model": model, "data": data, "features": features},
        "versions": {"torch": "2"},
    }


@pytest.fixture(scope="module")
def good_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    layout = FeatureLayout(ROWS, 2, RECIPE, "train", COLUMNS, "float32", ClassLabel(names=["cat", "dog"]))
    for shard in range(layout.shards):
        start, stop = layout.span(shard)
        rows = np.arange(start, stop, dtype=np.float32)
        values = {c.name: np.ones((len(rows), *c.shape), np.float32) for c in COLUMNS}
        with write_shard(folder, layout, shard) as append:
            hashes, labels = [f"{int(row):032x}" for row in rows], [int(row) % 2 for row in rows]
            append({"row": range(start, stop), "image_hash": hashes, "label": labels, **values})
    (folder / "manifest.json").write_text(json.dumps(store_manifest(layout)))
    return folder


def read_store(folder):
    store = FeatureStore.open(folder)
    assert store_card(store.manifest)
    repr(store)
    for column in store.columns:
        assert store.array(column.layer, column.timestep).shape == (len(store), *column.shape)
    assert len(store.labels()) == ROWS
    return store


@pytest.fixture
def store(good_store, tmp_path):
    return shutil.copytree(good_store, tmp_path / "store")


MANIFESTS = [
    ("rows", 1e18, r"rows is 1e\+18"),
    ("rows", 10**18, "rows is 1000000000000000000; allowed"),
    ("rows", 6, "recipe.data.rows is 5"),
    ("rows", 11, "11 rows in shards of 2 are not 3 shards"),
    ("shard_size", 0, "shard_size is 0"),
    ("shards", 10**9, "shards is 1000000000"),
    ("shards", 2, "are not 2 shards"),
    ("complete", "yes", "complete is 'yes'"),
    ("columns", {}, "columns is an object of 0"),
    ("columns 0", {"layer": "mid"}, r"columns\[0\] has no 'name'"),
    ("columns 0 shape", [0], r"columns\[0\].shape\[0\] is 0"),
    ("columns 0 shape", [2**40], r"columns\[0\].shape\[0\]"),
    ("columns 0 timestep", math.nan, "columns is nan|timestep is nan"),
    ("columns 0 layer", "other", r"columns\[0\] is of a layer or level"),
    ("columns 1 name", "mid@t7", "a name that stands twice"),
    ("columns 1 name", "row", "a name that stands twice, or is 'row'"),
    ("recipe data split", "../../etc/x", "split is '../../etc/x'; allowed is the name of a split"),
    ("recipe data split", "/etc/x", "split is '/etc/x'"),
    ("recipe data split", "..", "split is '..'"),
    ("recipe features dtype", "object", "dtype is 'object'"),
    ("label names", ["a", "a"], "names is a list of 2; allowed is a list in which nothing stands twice"),
    ("label", None, "do not tell the same"),
    ("surprise", 1, "'surprise', which this version does not know"),
]


@pytest.mark.parametrize(("place", "value", "message"), MANIFESTS)
def test_a_manifest_that_says_what_cannot_be(store, place, value, message):
    path = store / "manifest.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    with pytest.raises(ValueError, match=rf"manifest\.json.*({message}).*If `diffusers-repr extract` made this"):
        FeatureStore.open(store)


def rewrite(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def with_column(table, name, values, kind=None):
    at = table.column_names.index(name)
    array = pa.array(values, kind or table.schema.field(name).type)
    return table.set_column(at, pa.field(name, array.type), array).replace_schema_metadata(table.schema.metadata)


def stamped(table, text):
    return table.replace_schema_metadata({**table.schema.metadata, b"diffusers_repr": text})


def outside(path):
    target = path.parents[2] / "elsewhere.parquet"
    shutil.move(path, target)
    path.symlink_to(target)


F32 = pa.list_(pa.float32(), 3)
SHARDS = {
    "NaN": (lambda p: rewrite(p, lambda t: with_column(t, "mid@t7", [[math.nan, 1, 1]] * 2)), "holds NaN or infinity"),
    "infinity": (lambda p: rewrite(p, lambda t: with_column(t, "mid@t7", [[1, math.inf, 1]] * 2)), "NaN or infinity"),
    "gap": (lambda p: rewrite(p, lambda t: with_column(t, "mid@t7", [None, [1, 1, 1]])), "has gaps|cannot be read"),
    "dtype": (
        lambda p: rewrite(p, lambda t: with_column(t, "mid@t7", [[1.0] * 3] * 2, pa.list_(pa.float64(), 3))),
        "has other columns",
    ),
    "shape": (
        lambda p: rewrite(p, lambda t: with_column(t, "mid@t7", [[1.0] * 4] * 2, pa.list_(pa.float32(), 4))),
        "has other columns",
    ),
    "label": (lambda p: rewrite(p, lambda t: with_column(t, "label", [0, 7])), "ids outside the 2 classes"),
    "no label": (lambda p: rewrite(p, lambda t: with_column(t, "label", [0, None])), "'label' has gaps"),
    "rows": (lambda p: rewrite(p, lambda t: t.slice(1)), "has 1 rows instead of 2"),
    "stamp": (lambda p: rewrite(p, lambda t: stamped(t, b"[1]")), "not written by this recipe"),
    "deep stamp": (lambda p: rewrite(p, lambda t: stamped(t, b"[" * 100_000)), "not written by this recipe"),
    "bytes": (lambda p: p.write_bytes(b"PAR1" + b"\xff" * 50 + b"PAR1"), "cannot be read"),
    "link": (outside, "leads out of the folder"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "is missing"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_that_is_not_what_the_manifest_says(store, case):
    damage, message = SHARDS[case]
    damage(store / "data/train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match=rf"train-00001-of-00003\.parquet' .*({message})"):
        read_store(store)
    with pytest.raises(ValueError, match=message):  # nor does a resumed extraction keep it
        FeatureStore.open(store).verify()


def test_every_value_of_a_stores_manifest(store):
    path = store / "manifest.json"
    assert (
        sweep(json.loads(path.read_text()), path.write_text, lambda: read_store(store), "manifest.json", ".parquet")
        > 50
    )


# Caches of latents and features


@pytest.fixture(scope="module")
def good_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    layout = TensorLayout(ROWS, 2, RECIPE, "features", {"tokens": (1, 4, 3), "global": (1, 3)}, "float32")
    for shard in range(layout.shards):
        start, stop = layout.span(shard)
        tensors = {name: torch.ones(stop - start, *shape) for name, shape in layout.tensors.items()}
        with write_shard(folder, layout, shard) as append:
            append({**tensors, INDEX: torch.arange(start, stop)})
    recipe = {"encoder": {"weights": RECIPE}, "data": {"rows": ROWS}, "mirrors": 1, "dtype": "float32"}
    about = {"name": "dino", "fingerprint": {"name": "dino"}, "grid": [2, 2]}
    manifest = TensorCache.manifest_of(layout, recipe, about, complete=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def cache(good_cache, tmp_path):
    return shutil.copytree(good_cache, tmp_path / "cache")


def read_cache(folder):
    opened = TensorCache.open(folder, "features")
    repr(opened)
    assert opened.mirrors == 1
    return [opened[row] for row in range(len(opened))]


CACHES = [
    ("layout rows", 1e18, r"layout.rows is 1e\+18"),
    ("layout shard_size", 0, "layout.shard_size is 0"),
    ("layout shards", 10**9, "layout.shards is 1000000000"),
    ("layout shards", 4, "are not 4 shards"),
    ("layout kind", "../x", "layout.kind is '../x'"),
    ("layout dtype", "float16", "layout.dtype and recipe.dtype do not tell the same"),
    ("layout tensors", {"../x": [1]}, "a name of letters, digits"),
    ("layout tensors", {"moments": [1, 2]}, "which a cache of features has not"),
    ("layout tensors global", [2, 3], "has not the mirrors"),
    ("recipe mirrors", 0, "recipe.mirrors is 0"),
    ("about", {"name": "dino"}, "about lacks the name, fingerprint or grid"),
    ("about name", None, "about.name is null"),
    ("layout", {}, "layout has no 'kind'"),
]


@pytest.mark.parametrize(("place", "value", "message"), CACHES)
def test_a_caches_manifest_that_says_what_cannot_be(cache, place, value, message):
    path = cache / "manifest.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    with pytest.raises(ValueError, match=rf"manifest\.json.*({message}).*If `diffusers-repr cache` made this"):
        TensorCache.open(cache, "features")


def tamper(path, stamp=None, **tensors):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = file.metadata()
    save_file({**load_file(path), **tensors}, path, told if stamp is None else {"diffusers_repr": stamp})


FILES = {
    "NaN": (lambda p: tamper(p, tokens=torch.full((2, 1, 4, 3), math.nan)), "NaN or infinity in 'tokens' of row 2"),
    "infinity": (lambda p: tamper(p, tokens=torch.full((2, 1, 4, 3), -math.inf)), "NaN or infinity in 'tokens'"),
    "index": (lambda p: tamper(p, index=torch.tensor([-1, 3])), "row 2 stands for image -1"),
    "index beyond": (lambda p: tamper(p, index=torch.tensor([5, 3])), "row 2 stands for image 5"),
    "dtype": (lambda p: tamper(p, tokens=torch.ones(2, 1, 4, 3, dtype=torch.float64)), "holds .*F64.* instead of"),
    "index dtype": (lambda p: tamper(p, index=torch.tensor([2.0, 3.0])), "holds .* instead of"),
    "shape": (lambda p: tamper(p, tokens=torch.ones(2, 1, 3, 3)), "holds .* instead of"),
    "more": (lambda p: tamper(p, more=torch.ones(1)), "holds .* instead of"),
    "stamp": (lambda p: tamper(p, "[]"), "not written by this recipe"),
    "deep stamp": (lambda p: tamper(p, "[" * 100_000), "not written by this recipe"),
    "header": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "cannot be read"),
    "link": (lambda p: (shutil.move(p, p.parents[2] / "x"), p.symlink_to(p.parents[2] / "x")), "leads out"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_caches_shard_that_is_not_what_the_manifest_says(cache, case):
    damage, message = FILES[case]
    damage(cache / "data/features-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=rf"features-00001-of-00003\.safetensors' .*({message})"):
        read_cache(cache)


def test_every_value_of_a_caches_manifest(cache):
    path = cache / "manifest.json"
    assert (
        sweep(
            json.loads(path.read_text()), path.write_text, lambda: read_cache(cache), "manifest.json", ".safetensors"
        )
        > 20
    )


@pytest.mark.parametrize("kind", ["images", "assignments"])
def test_every_value_of_the_manifest_of_other_kinds(tmp_path, kind):
    """What is not refused reads the very files that were written."""
    if kind == "images":
        keys = [ImageKey("m", 4, 4, steps=1, seed=seed) for seed in range(3)]
        made = write_images(
            tmp_path / "out", keys, lambda k: [Image.new("L", (4, 4))] * len(k), shard_size=2, progress=False
        )
        read = ImageStore.image_keys
    else:
        made = write_assignments(
            tmp_path / "out", 3, lambda start, stop: {"class_id": np.arange(start, stop)}, shard_size=2,
            assigner={"kind": "rows"}, data={"name": "pets"}, num_classes=3, progress=False,
        )  # fmt: skip
        read = methodcaller("array", "class_id")
    path = made.folder / "manifest.json"
    good = json.loads(path.read_text())
    refused = sweep(good, path.write_text, lambda: read(type(made).open(made.folder)), "manifest.json", ".parquet")
    assert refused > 15


def test_the_links_of_the_hubs_cache_are_followed(good_store, good_cache, tmp_path):
    for good, read in ((good_store, read_store), (good_cache, read_cache)):
        blobs, snapshot = tmp_path / good.name / "blobs", tmp_path / good.name / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        for file in (path for path in good.rglob("*") if path.is_file()):
            shutil.copy(file, blobs / file.name)
            link = snapshot / file.relative_to(good)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / file.name)
        read(snapshot)
