"""The feature store: what it holds, how it resumes, and what it refuses."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.hub.identity import fingerprint
from diffusers_repr.store import parquet
from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.manifest import recipe_differences
from tests.testers.models import build

ROWS = 11  # prime: shards of 4 leave a short one


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed, size=(16, 16), mode="L"):
    array = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def pictures(count=ROWS, labels=True, first=0, **kwargs):
    features = {"image": datasets.Image()}
    rows = {"image": [picture(first + i, **kwargs) for i in range(count)]}
    if labels:
        features["label"] = ClassLabel(names=["cat", "dog", "emu"])
        rows["label"] = [i % 3 for i in range(count)]
    return from_dataset(Dataset.from_dict(rows, features=Features(features)), name="pets")


def extractor(name="ddpm", layers=("mid_block", "up_blocks.1"), timestep=(100, 261), **settings):
    settings = {"pooling": "mean", "batch_size": 3, **settings}
    return FeatureExtractor(Denoiser.from_pipe(build(name)), list(layers), list(timestep), **settings)


def make(out, data=None, shard_size=4, progress=False, dtype="float32", limit=None, prompt=None, **settings):
    data = data or pictures()
    call = {"dtype": dtype, "limit": limit, "prompt": prompt}
    return extract_to_store(extractor(**settings), data, out, shard_size=shard_size, progress=progress, **call)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# What it holds


def test_holds_what_the_extractor_gives(tmp_path):
    data = pictures()
    store = make(tmp_path / "out", data)
    images = [image for batch, _ in data.batches(4) for image in batch]
    direct = extractor()(images)
    assert [c.name for c in store.columns] == [
        "mid_block@t100",
        "mid_block@t261",
        "up_blocks.1@t100",
        "up_blocks.1@t261",
    ]
    for column in store.columns:
        expected = direct[column.layer][column.level].numpy()
        np.testing.assert_allclose(store.array(column.layer, column.timestep), expected, atol=1e-5, rtol=1e-5)
    assert store.labels().tolist() == [i % 3 for i in range(ROWS)]
    assert store.label_names == ["cat", "dog", "emu"]
    assert len(store) == ROWS
    parts = list(store.arrays("mid_block", 261, batch_rows=2))
    assert [len(part) for part in parts] == [2, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), store.array("mid_block", 261))
    store.verify()


def test_files_have_fixed_names_and_rows(tmp_path):
    store = make(tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    assert files == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert [pq.read_metadata(tmp_path / "out/data" / f).num_rows for f in files] == [4, 4, 3]
    assert set(contents(tmp_path / "out")) - {f"data/{f}" for f in files} == {
        "manifest.json",
        "README.md",
        ".extract.tmp",
    }
    assert repr(store).startswith("FeatureStore(")


def test_loads_with_datasets(tmp_path):
    store = make(tmp_path / "out", dtype="float16")
    for loaded in (store.load(), datasets.load_dataset(str(tmp_path / "out"))["train"]):
        assert loaded.features["label"].names == ["cat", "dog", "emu"]
        assert loaded.features["mid_block@t261"] == datasets.List(datasets.Value("float16"), length=16)
        assert loaded["row"][:] == list(range(ROWS))
        assert len(set(loaded["image_hash"])) == ROWS
        column = np.array(loaded.with_format("numpy")["up_blocks.1@t100"][:])
        np.testing.assert_array_equal(column, store.array("up_blocks.1", 100).astype(np.float32))
    assert store.array("mid_block", 261).dtype == np.float16


@pytest.mark.parametrize(("name", "layer", "shape"), [("sd", "up_blocks.1", (16, 8, 8)), ("dit", None, (64, 16))])
def test_unpooled_maps_and_tokens(tmp_path, name, layer, shape):
    layer = layer or "transformer_blocks.1"
    data = pictures(3, size=(32, 32), mode="RGB")
    settings = {"name": name, "layers": [layer], "timestep": [261], "pooling": None, "ensemble_size": 2}
    store = make(tmp_path / "out", data, shard_size=2, **settings)
    direct = extractor(**settings)([image for images, _ in data.batches(3) for image in images])[layer][0]
    assert store.columns[0].shape == shape
    np.testing.assert_allclose(store.array(layer), direct.numpy(), atol=1e-4, rtol=1e-4)
    assert store.columns[0].grid == ((8, 8) if name == "dit" else None)
    loaded = store.load().with_format("numpy")
    assert loaded[0][f"{layer}@t261"].shape == shape


def test_prompt_with_the_class_name(tmp_path):
    data = pictures(3, size=(32, 32), mode="RGB")
    settings = {"name": "sd", "layers": ["mid_block"], "timestep": [261]}
    store = make(tmp_path / "out", data, prompt="a photo of a {label}", **settings)
    images = [image for batch, _ in data.batches(3) for image in batch]
    direct = extractor(**settings)(images, prompt=["a photo of a cat", "a photo of a dog", "a photo of a emu"])
    np.testing.assert_allclose(store.array("mid_block"), direct["mid_block"][0].numpy(), atol=1e-5, rtol=1e-5)


def test_without_labels(tmp_path):
    store = make(tmp_path / "out", pictures(labels=False))
    assert "label" not in store.load().column_names
    with pytest.raises(ValueError, match="no labels"):
        store.labels()


def test_manifest_and_card(tmp_path):
    store = make(tmp_path / "out", limit=9, seed=3)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["rows"] == 9
    recipe = manifest["recipe"]
    assert recipe["features"]["levels"][1]["timestep"] == 261
    assert recipe["features"]["seed"] == 3
    assert recipe["data"] == {
        "name": "pets",
        "split": "train",
        "image_column": "image",
        "label_column": "label",
        "rows": 9,
    }
    assert set(manifest["versions"]) >= {"torch", "diffusers", "diffusers-repr"}
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "`up_blocks.1@t261`" in card.content
    assert store.recipe == recipe


# Resuming


def test_resumes_bit_for_bit_after_a_stop_within_a_shard(tmp_path, monkeypatch):
    whole = contents(make(tmp_path / "whole").folder)
    table_of, calls = parquet.table_of, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return table_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "table_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/data").iterdir()] == ["train-00000-of-00003.parquet"]
    told = "not finished: 4 of 11 rows .1 of 3 shards.*same `diffusers-repr extract` command"
    with pytest.raises(ValueError, match=told):
        FeatureStore.open(tmp_path / "out")
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_reading_finds_a_changed_byte(tmp_path):
    store = make(tmp_path / "out")
    path = tmp_path / "out/data/train-00001-of-00003.parquet"
    data = path.read_bytes()
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        places = {group.column(n).path_in_schema.split(".")[0]: group.column(n) for n in range(group.num_columns)}
    reads = {"label": store.labels, "mid_block@t261": lambda: store.array("mid_block", 261)}
    for name, read in reads.items():
        last = places[name].data_page_offset + places[name].total_compressed_size - 1
        path.write_bytes(data[:last] + bytes([data[last] ^ 0xFF]) + data[last + 1 :])
        with pytest.raises(
            ValueError, match=r"train-00001-of-00003.parquet' cannot be read.*same `diffusers-repr extract`"
        ):
            read()


def test_another_recipe_in_the_same_folder_shows_what_differs(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    for change, line in (
        ({"seed": 1}, "features.seed: 0 -> 1"),
        ({"layers": ["mid_block"]}, r'features.layers: \["mid_block", "up_blocks.1"\] -> \["mid_block"\]'),
        ({"dtype": "float16"}, 'features.dtype: "float32" -> "float16"'),
        ({"limit": 3}, "data.rows: 11 -> 3"),
    ):
        with pytest.raises(FileExistsError, match=f"another recipe; nothing was changed(.|\n)*{line}"):
            make(tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before
    make(tmp_path / "out", batch_size=5)  # the batch size is no part of the recipe


def test_retrained_weights_are_another_recipe(tmp_path):
    make(tmp_path / "out")
    changed = extractor()
    with torch.no_grad():
        changed.denoiser.model.mid_block.resnets[0].conv1.bias.add_(0.1)
    with pytest.raises(FileExistsError, match="model.weights"):
        extract_to_store(changed, pictures(), tmp_path / "out", shard_size=4, progress=False)


def test_a_changed_data_set_is_noticed(tmp_path):
    make(tmp_path / "out")
    with pytest.raises(FileExistsError, match="Row 0 of pets is another image.*data set has changed"):
        make(tmp_path / "out", pictures(first=50))


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "float32 or float16"),
        ({"noise": "fresh"}, "could not be resumed; use per_image, shared, clean"),
        ({"shard_size": 0}, "shard_size must be a whole number from 1"),
        ({"limit": 0}, "limit must be a whole number from 1"),
        ({"timestep": [100, 100]}, "not distinct"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_images_of_several_sizes_name_the_row(tmp_path):
    rows = {"image": [picture(0), picture(1), picture(2, size=(16, 24))]}
    data = from_dataset(Dataset.from_dict(rows, features=Features({"image": datasets.Image()})), name="pets")
    with pytest.raises(ValueError, match=r"Row 2 of pets is 16 x 24.*--image_size"):
        make(tmp_path / "out", data, image_size="keep")
    make(tmp_path / "resized", data, image_size=16)


def test_overflow_of_float16_names_the_layer(tmp_path):
    big = extractor(layers=["mid_block"], timestep=[100])
    big.denoiser.model.mid_block.register_forward_hook(lambda m, a, out: out * 1e6)
    with pytest.raises(ValueError, match="'mid_block' reach.*float16 holds.*float32"):
        extract_to_store(big, pictures(), tmp_path / "out", dtype="float16", progress=False)


def test_a_label_in_the_prompt_needs_names(tmp_path):
    data = pictures(3, labels=False, size=(32, 32), mode="RGB")
    with pytest.raises(ValueError, match="no label names"):
        make(tmp_path / "out", data, name="sd", layers=["mid_block"], prompt="a {label}")


def test_unknown_columns_and_folders(tmp_path):
    store = make(tmp_path / "out")
    with pytest.raises(KeyError, match="not in the store.*mid_block@t100"):
        store.array("up_blocks.0", 100)
    with pytest.raises(KeyError, match="several timesteps"):
        store.array("mid_block")
    with pytest.raises(FileNotFoundError):
        FeatureStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no store of features.*it holds nothing"):
        FeatureStore.open(tmp_path / "empty")


def test_progress_bar_counts_images(tmp_path, capsys):
    make(tmp_path / "out", progress=True)
    assert " image/s" in capsys.readouterr().err


def test_recipe_helpers():
    assert recipe_differences({"a": [1]}, {"a": [1], "b": 2}) == ["b: null -> 2"]
    pipe = build("ddpm")
    assert fingerprint(pipe.unet, None) == fingerprint(build("ddpm").unet)
    assert fingerprint(pipe.unet.to(torch.bfloat16)) != fingerprint(build("ddpm").unet)
    assert fingerprint(build("ddpm").unet.to("meta")) is None
