"""Folders of the format before all stores became one: they open, resume and verify, with the numbers they had."""

import hashlib
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from diffusers_repr import Denoiser, Encoder, FeatureExtractor
from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.latents import cache_latents
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.teacher_features import list_features
from diffusers_repr.encoders.feature_cache import cache_features
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.store import FeatureStore, TensorCache
from tests.store.old_cases import CLASSES, EXTRACTION, OLD, images, pipeline, teacher_module, vae

TOLD = json.loads((OLD / "expected.json").read_text())  # what the code that wrote them read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def teacher():
    return Encoder.from_module(teacher_module(), patch_size=4, name="org/teacher")


def extract(out):
    extractor = FeatureExtractor(Denoiser.from_pipe(pipeline()), pooling="mean", **EXTRACTION)
    return extract_to_store(extractor, from_dataset(images(), name="pets"), out, shard_size=2, progress=False)


def encode(out):
    data = load_train_data(DataConfig(random_flip=True), 3, 8, images())
    return cache_latents(vae(), data, out, CacheSettings(shard_size=2, progress=False))


def teach(out):
    data = load_train_data(DataConfig(random_flip=True), 3, 8, images())
    settings = CacheSettings(shard_size=2, progress=False, dtype="float16")
    return cache_features(teacher(), data, out.parent, settings)


def test_their_numbers():
    store = FeatureStore.open(OLD / "features")
    store.verify()
    assert {c.name: digest(store.array(c.layer, c.timestep)) for c in store.columns} == TOLD["features"]
    assert store.labels().tolist() == TOLD["labels"] == CLASSES
    latents, features = TensorCache.open(OLD / "latents", "latents"), list_features(OLD / "teachers")["org/teacher"]
    for cache in (latents, features):
        cache.verify()
    assert digest(*[row["moments"] for row in latents]) == TOLD["latents"]
    for name in ("tokens", "global"):
        assert digest(*[row[name] for row in features]) == TOLD[name]


def test_a_run_reads_them():
    config = DataConfig(random_flip=True, latents_dir=str(OLD / "latents"), features_dir=str(OLD / "teachers"))
    data = load_train_data(config, 3, 8, images(), vae=vae(), encoders=[teacher()])
    assert data.fingerprint() == TOLD["cached"]
    torch.manual_seed(0)
    batch = data.on_device(default_collate([data[i] for i in (3, 1, 4, 0)]))
    told = TOLD["batch"]
    assert digest(batch["moments"]) == told["moments"]
    assert digest(batch["features"]["org/teacher"]) == told["features"]
    assert batch["class_labels"].tolist() == told["labels"]
    numpy_latents = load_train_data(
        DataConfig(str(OLD / "repa"), latents_dir=str(OLD / "repa/vae-sd")), 3, 8, vae=vae()
    )
    assert digest(*[numpy_latents[i]["moments"] for i in range(5)]) == TOLD["vae-sd"]
    assert numpy_latents.fingerprint() == TOLD["vae-sd fingerprint"]


@pytest.mark.parametrize(
    ("folder", "write"), [("features", extract), ("latents", encode), ("teachers/org_teacher", teach)]
)
def test_they_are_gone_on_with(tmp_path, folder, write):
    """One shard lost and the manifest open, as a kill leaves them: the others are kept, byte for byte."""
    out = tmp_path / "old" / folder.split("/")[-1]
    shutil.copytree(OLD / folder, out)
    files = sorted((out / "data").iterdir())
    before = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    write(out).verify()
    assert [file.stat().st_mtime_ns for file in files][::2] == times[::2]
    assert [file.read_bytes() for file in files][::2] == before[::2]
    after = json.loads((out / "manifest.json").read_text())
    assert {**after, "versions": None} == {**manifest, "versions": None}
