"""`diffusers-repr extract` as a user runs it: in one process, in two, killed and run again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.store.feature_store import FeatureStore
from tests.testers.models import saved

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_data(path, rows, size=(16, 16)):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)) for _ in range(rows)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(rows)]}, features=features)
    data.to_parquet(path)
    return str(path)


def command(model, data, out, *more, **settings):
    settings = {"layers": "mid_block", "timesteps": 100, "batch_size": 4, "shard_size": 5, **settings}
    flags = [part for name, value in settings.items() for part in (f"--{name}", *str(value).split())]
    return ["extract", str(model), str(data), "--out", str(out), *flags, *more]


def environment(tmp_path, **more):
    threads = str(torch.get_num_threads())  # sums depend on it in the last bit
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    return {**os.environ, **own, **more}


def shards(out):
    return {p.name: p.read_bytes() for p in sorted((Path(out) / "data").glob("*.parquet"))}


def test_from_command_to_dataset(tmp_path, capsys):
    data, out = write_data(tmp_path / "pets.parquet", 7), tmp_path / "out"
    flags = {
        "layers": "mid_block up_blocks.1",
        "timesteps": "100 261.5",
        "store_dtype": "float16",
        "pooling": "adaptive:2",
    }
    assert main(command(saved("ddpm"), data, out, ensemble_size=2, seed=3, **flags)) == 0
    printed = capsys.readouterr()
    assert "images: 16 x 16 pixels (H x W), the model's own size; --image_size keep leaves theirs" in printed.out
    assert "7 rows in 2 shards" in printed.out
    assert "up_blocks.1@t261.5  64" in printed.out
    assert "image/s" in printed.err
    loaded = datasets.load_dataset(str(out), split="train")
    assert loaded.features["mid_block@t100"] == datasets.List(datasets.Value("float16"), length=64)
    assert loaded["label"][:] == [0, 1, 0, 1, 0, 1, 0]
    recipe = FeatureStore.open(out).recipe
    assert recipe["model"]["name"] == str(saved("ddpm"))
    assert (recipe["features"]["seed"], recipe["features"]["ensemble_size"]) == (3, 2)
    assert main([*command(saved("ddpm"), data, out, ensemble_size=2, seed=3, **flags), "--quiet"]) == 0
    assert "images" not in capsys.readouterr().err
    other = command(saved("ddpm"), data, out, ensemble_size=2, seed=4, **flags)
    assert main(other) == 2
    told = capsys.readouterr().err
    assert "features.seed: 3 -> 4" in told
    assert "--overwrite deletes what is there first" in told
    assert main([*other, "--overwrite", "--quiet"]) == 0
    assert "it/s" not in capsys.readouterr().err  # nor bars of others
    assert FeatureStore.open(out).recipe["features"]["seed"] == 4


def test_text_model_with_class_names_and_maps(tmp_path):
    data, out = write_data(tmp_path / "pets.parquet", 3), tmp_path / "out"
    flags = {"pooling": "none", "image_size": "32 48", "layers": "up_blocks.1", "timesteps": 261, "limit": 2}
    assert main([*command(saved("sd"), data, out, **flags), "--prompt", "a photo of a {label}"]) == 0
    store = FeatureStore.open(out)
    assert store.array("up_blocks.1").shape == (2, 16, 8, 12)
    assert store.recipe["features"]["prompt"] == "a photo of a {label}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layers": "midblock"}, "No layer 'midblock'.*Closest.*mid_block"),
        ({"layers": "3"}, "No layer '3'"),
        ({"timesteps": 1000}, "outside"),
        ({"image_column": "photo"}, "no column 'photo'; columns are"),
        ({"label_column": "kind"}, "no column 'kind'"),
        ({"pooling": "median"}, "Unknown pooling 'median'"),
        ({"image_size": 15}, "multiples of 4"),
        ({"image_size": "8 8 8"}, "one side, or height and width; got 3"),
        ({"ensemble_size": 0}, "ensemble_size must be"),
        ({"noise": "clean", "ensemble_size": 2}, "average equal features"),
        ({"class_label": 3}, "unconditional"),
        ({"prompt": "cat"}, "takes no prompt"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, capsys, flags, message):
    data = write_data(tmp_path / "pets.parquet", 3)
    assert main(command(saved("ddpm"), data, tmp_path / "out", **flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusers-repr extract: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [["--timesteps", "late"], ["--noise", "fresh"], ["--store_dtype", "bfloat16"]])
def test_flags_with_a_fixed_choice(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        main([*command("model", "data", tmp_path / "out"), *flag])
    assert flag[1] in capsys.readouterr().err


def test_wrong_model_and_data(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    data = write_data(tmp_path / "set/train.parquet", 3)
    (tmp_path / "empty").mkdir()
    assert main(command(saved("ddpm"), tmp_path / "set", tmp_path / "out", split="validation")) == 2
    assert "no split 'validation'; it has train" in capsys.readouterr().err
    for model, source, message in (
        (tmp_path / "empty", data, "no pipeline folder"),
        (tmp_path / "nowhere", data, "No folder"),
        (saved("ddpm"), tmp_path / "nowhere", "No file or folder"),
        (saved("ddpm"), tmp_path / "empty", "as a data set"),
    ):
        assert main(command(model, source, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err


def test_two_processes_share_the_shards(together, tmp_path):
    (code, printed), quiet = together[1]["extract"]
    assert code == 0
    assert "23 rows in 5 shards, written by 2 processes" in printed
    assert quiet == [0, ""]
    inputs, out = together[0] / "inputs", together[0] / "extract"
    assert main(command(inputs / "ddpm", inputs / "pets.parquet", tmp_path / "one")) == 0
    two, one = FeatureStore.open(out), FeatureStore.open(tmp_path / "one")
    two.verify()
    assert two.load()["row"][:] == list(range(23))  # nothing lost, nothing doubled
    assert two.load()["image_hash"][:] == one.load()["image_hash"][:]
    np.testing.assert_allclose(two.array("mid_block"), one.array("mid_block"), atol=1e-5, rtol=1e-5)
    assert two.recipe == one.recipe


def start(arguments, tmp_path):
    return subprocess.Popen(
        [sys.executable, "-m", "diffusers_repr", *arguments],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after(arguments, out, count, tmp_path):
    """Run, and kill the process outright once `count` shards are there; the names of the shards it left."""
    process = start(arguments, tmp_path)
    deadline = time.monotonic() + 200
    while len(shards(out)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    return process.returncode, set(shards(out))


@pytest.mark.slow
def test_killed_and_run_again_equals_a_whole_run(tmp_path):
    rows = 100
    data, out = write_data(tmp_path / "pets.parquet", rows), tmp_path / "out"
    arguments = command(saved("ddpm"), data, out, ensemble_size=4)
    code, left = kill_after(arguments, out, 3, tmp_path)
    assert code == -signal.SIGKILL
    assert 3 <= len(left) < 20
    before = shards(out)
    with pytest.raises(ValueError, match="not finished"):
        FeatureStore.open(out)
    assert start(arguments, tmp_path).wait(200) == 0
    store = FeatureStore.open(out)
    store.verify()
    assert len(store) == rows
    assert {name: shards(out)[name] for name in before} == before
    assert not list((out / "data").glob(".*"))
    assert main(command(saved("ddpm"), data, tmp_path / "whole", ensemble_size=4)) == 0
    assert shards(tmp_path / "whole") == shards(out)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    data, out = write_data(tmp_path / "pets.parquet", 300), tmp_path / "out"
    arguments = command(saved("ddpm"), data, out, ensemble_size=4)
    kills = 0
    for count in (0, 1, 5, 9, 20, 30, 45, 55):
        code, left = kill_after(arguments, out, count, tmp_path)
        kills += code == -signal.SIGKILL
        assert len(left) >= count
    assert kills >= 6
    assert start(arguments, tmp_path).wait(200) == 0
    assert main(command(saved("ddpm"), data, tmp_path / "whole", ensemble_size=4)) == 0
    assert shards(tmp_path / "whole") == shards(out)
