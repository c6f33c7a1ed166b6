"""`diffusers-repr cache`: by flags and by a recipe, on one process and on two, read by the training data."""

import json

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_repr.cli import main, read_settings
from diffusers_repr.cli.cache import load_data, load_vae
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.teacher_features import list_features
from diffusers_repr.encoders import Encoder
from diffusers_repr.store.tensor_cache import TensorCache
from tests.data.data_cases import rows
from tests.data.latent_cases import contents, make_vae
from tests.encoders.vits import build

ROWS = 11


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def inputs(tmp_path):
    make_inputs(tmp_path)
    return tmp_path


def make_inputs(folder):
    """Images, a VAE inside a pipeline's folder, and an encoder."""
    rows(ROWS, ((24, 31), (17, 16))).to_parquet(folder / "images.parquet")
    make_vae().save_pretrained(folder / "pipeline/vae")
    build("dinov2").save_pretrained(folder / "dino")


def flags(folder, out, **changes):
    settings = {
        "dataset_name": folder / "images.parquet", "resolution": 16, "random_flip": True,
        "latents_dir": out / "latents", "features_dir": out / "features",
        "vae": folder / "pipeline", "encoder": folder / "dino", "cache_features": True,
        "shard_size": 2, "batch_size": 2, **changes,
    }  # fmt: skip
    return [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]


def test_two_processes_write_what_one_writes(together, tmp_path):
    folder, told = together
    assert main(["cache", *flags(folder / "inputs", tmp_path)]) == 0
    assert sum("(1 of 2 processes)" in printed for printed in told["cache"]) == 1
    one, two = contents(tmp_path), contents(folder / "cache")
    assert len([name for name in one if name.endswith(".safetensors")]) == 12  # six shards of each kind
    assert one == two
    cache = TensorCache.open(folder / "cache/latents", "latents")
    cache.verify()
    assert [int(cache[i]["index"]) for i in range(ROWS)] == list(range(ROWS))


def test_training_reads_what_the_command_wrote(inputs, capsys):
    assert main(["cache", *flags(inputs, inputs / "out")]) == 0
    assert "11 rows of moments (2, 8, 8, 8), float32" in capsys.readouterr().out
    config = DataConfig(
        dataset_name=str(inputs / "images.parquet"), resolution=16, random_flip=True,
        latents_dir=str(inputs / "out/latents"), features_dir=str(inputs / "out/features"),
    )  # fmt: skip
    encoder = Encoder.from_pretrained(inputs / "dino")
    data = load_train_data(config, 3, vae=load_vae(read_settings("cache", flags(inputs, inputs))), encoders=[encoder])
    sample = data[3]
    assert "pixel_values" not in sample
    images = load_data(config, 3)
    pixels = images[3]["pixel_values"][None].float() / 127.5 - 1
    torch.testing.assert_close(
        sample["features"]["dino"][1].float(), encoder.encode_pixels(pixels.flip(-1)).tokens[0], atol=5e-3, rtol=5e-3
    )
    grid = list_features(inputs / "out/features")["dino"].manifest["about"]["grid"]
    assert grid[0] * grid[1] == sample["features"]["dino"].shape[1]


def test_a_recipe_of_the_training_and_only_latents(inputs):
    recipe = {
        "dataset_name": str(inputs / "images.parquet"), "resolution": 16, "latents_dir": str(inputs / "latents"),
        "vae": str(inputs / "pipeline"), "encoder": ["none"], "learning_rate": 1e-4, "model": {"sample_size": 8},
        "random_flip": None, "num_neighbours": 2, "include_query": True,
    }  # fmt: skip
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = ["--config", str(inputs / "recipe.yaml"), "--vae_subfolder", "vae"]
    assert main(["cache", *recipe, "--store_dtype", "float16", "--both_mirrors", "false"]) == 0
    manifest = json.loads((inputs / "latents/manifest.json").read_text())
    assert (manifest["recipe"]["dtype"], manifest["recipe"]["mirrors"]) == ("float16", 1)
    assert manifest["about"]["vae"] == "pipeline"


def test_the_digits_in_grey():
    words = "--dataset_name digits --resolution 8 --features_dir f --cache_features --encoder a b"
    settings = read_settings("cache", words.split())
    assert settings.teachers == ["a", "b"]
    assert load_data(settings, 1)[0]["pixel_values"].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_dir": None, "cache_features": None}, "Nothing to write"),
        ({"vae": None}, "--latents_dir needs --vae"),
        ({"encoder": None}, "--cache_features needs --encoder"),
        ({"encoder": "none"}, "--cache_features needs --encoder"),
        ({"features_dir": None}, "and --features_dir to write to"),
        ({"streaming": True, "latents_dir": None, "features_dir": None}, "leave out --streaming"),
        ({"resolution": None}, "pass --resolution"),
    ],
)
def test_bad_calls(inputs, changes, message, capsys):
    assert main(["cache", *flags(inputs, inputs / "out", **changes)]) == 2
    assert message in capsys.readouterr().err
