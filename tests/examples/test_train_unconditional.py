"""What is this script's own: models, pipelines, recipes. The loop is tested in tests/training."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from PIL import Image
from safetensors.torch import load_file
from train_unconditional import ModelConfig, main

from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import read_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.splits import open_split
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import picture
from tests.training.loop_cases import forget_accelerate

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "ddpm_digits.yaml"
PERCEPTUAL_RECIPE = EXAMPLES / "configs" / "perceptual_digits.yaml"
DIGITS_MODEL = EXAMPLES / "models" / "digits-ddpm"
RECIPE = {
    "dataset_name": "digits",
    "model": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "dropout": 0.1,
    },
    "scheduler": {"num_train_timesteps": 100},
    "random_rotation": 10.0,
    "random_shift": 0.1,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "seed": 7,
    "save_dtype": "float16",
    "eval_batch_size": 8,
    "num_inference_steps": 2,
}


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def launch(config: str, output: Path, *flags: str) -> str:
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(EXAMPLES / "train_unconditional.py"), "--config", config, "--output_dir", str(output), *flags]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def fresh_accelerate():
    forget_accelerate()
    yield
    forget_accelerate()


def run_here(folder: Path, **changes) -> Path:
    main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / "out")])
    return folder / "out"


def parse(argv: list[str]) -> tuple[TrainingConfig, DataConfig, ModelConfig]:
    return parse_recipe((TrainingConfig, DataConfig, ModelConfig), argv)


def recipe_on_card(model: Path) -> dict:
    return yaml.safe_load((model / "README.md").read_text().split("```yaml\n")[1].split("```")[0])


# --- runs


def test_a_launched_run(tmp_path):
    """Two steps by the command of the docstring, then the same command again."""
    config, output = write_recipe(tmp_path), tmp_path / "out"
    assert "1 process, 8 of 997 images a step, steps 0 to 2" in launch(config, output)
    lines = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    card = (output / "README.md").read_text()
    assert "`accelerate launch examples/train_unconditional.py --config recipe.yaml`" in card
    assert "997 images of `digits`, split `train`" in card
    assert "Classes: none" in card
    pipeline = DDPMPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    weights = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(output / "checkpoint-00000002" / "ema.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, averaged[f"network.{name}"].half()), name
    assert picture(output / "samples.png").width == 2 * 6 + 8 * 64 + 7 * 4
    forget_accelerate()
    main(["--config", str(output / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])  # as the card says
    again = load_file(tmp_path / "again" / "checkpoint-00000002" / "model.safetensors")
    assert all(
        torch.equal(tensor, again[name])
        for name, tensor in load_file(output / "checkpoint-00000002" / "model.safetensors").items()
    )


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_and_images_of_a_folder(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3), dtype=np.uint8)
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"photo": [Image.fromarray(image) for image in pixels], "label": [0, 1, None, 1, 0]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    output = run_here(
        tmp_path,
        dataset_name=str(tmp_path / "data"),
        image_column="photo",
        model=RECIPE["model"] | {"in_channels": 3, "out_channels": 3},
        scheduler={"prediction_type": kind},
        random_flip=True,
        max_train_steps=1,
        eval_batch_size=0,
    )
    assert DDPMPipeline.from_pretrained(output).scheduler.config.prediction_type == kind
    state = json.loads((output / "checkpoint-00000001" / "state.json").read_text())
    assert state["identity"]["data"]["labels"] is None  # an unconditional model asks for none, not even whole ones


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_uvit_of_classes(tmp_path):
    sizes = {"sample_size": 8, "in_channels": 1, "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
    output = run_here(tmp_path, network="UViTTransformer2DModel", model=sizes | {"num_classes": 10}, max_train_steps=1)
    pipe = SiTPipeline.from_pretrained(output)
    assert pipe.transformer.config.num_classes == 10
    assert pipe.scheduler.config.num_train_timesteps == 100
    assert picture(output / "samples.png").width > 2 * 6 + 8 * 64 + 7 * 4  # names of classes in front


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_second_stage_by_perceptual_loss(tmp_path):
    """It goes on from the base's weights, by its own noise process; the base brings the network."""
    flags = ("--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--eval_batch_size", "0")
    kept = {k: v for k, v in RECIPE.items() if k not in ("model", "scheduler")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**kept, "perceptual_base": str(DIGITS_MODEL)}))
    main(["--config", str(tmp_path / "recipe.yaml"), *flags])
    forget_accelerate()
    line = json.loads((tmp_path / "out" / "loss.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(line["perceptual"])
    assert line["denoising"] > 0
    pipe, base = DDPMPipeline.from_pretrained(tmp_path / "out"), DDPMPipeline.from_pretrained(DIGITS_MODEL)
    assert pipe.scheduler.config.beta_schedule == base.scheduler.config.beta_schedule
    far = [(a - b).abs().max() for a, b in zip(pipe.unet.parameters(), base.unet.parameters(), strict=True)]
    assert 0 < max(far) < 0.05
    config = parse_recipe((TrainingConfig, DataConfig, ModelConfig), ["--config", str(PERCEPTUAL_RECIPE)])[2]
    assert config.perceptual_base == "examples/models/digits-ddpm"


def test_dry_run(tmp_path, capsys):
    main(["--config", str(DIGITS_RECIPE), "--dry_run", "--seed", "5", "--output_dir", str(tmp_path / "none")])
    printed = capsys.readouterr().out
    recipe = yaml.safe_load(printed)
    (tmp_path / "again.yaml").write_text(printed)
    first = parse(["--config", str(DIGITS_RECIPE), "--seed", "5"])
    assert recipe["seed"] == 5
    again = parse(["--config", str(tmp_path / "again.yaml"), "--output_dir", first[0].output_dir])
    assert (again[0], again[2]) == (first[0], first[2])
    assert "# network: 701,345 parameters (UNet2DModel)" in printed
    assert not (tmp_path / "none").exists()


# --- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "Unknown key 'learning_rat' in .*Closest allowed: .'learning_rate'"),
        ({"model": {"sample_sise": 8}}, "Unknown key 'sample_sise' in `model`.*'sample_size'"),
        ({"scheduler": {"betas": 1}}, "Unknown key 'betas' in `scheduler`"),
        ({"model": {}}, "needs `sample_size`"),
        ({"network": "UVit2DModel"}, "`network` is one of UNet2DModel, UViTTransformer2DModel"),
        ({"network": "UViTTransformer2DModel"}, "Unknown key .* in `model`"),
        ({"model": [8]}, "model is a list of 1; allowed is an object"),
        ({"label_dropout": 1.5}, "`label_dropout` is a probability, got 1.5"),
        ({"label_dropout": -0.1}, "`label_dropout` is a probability"),
        ({"model": RECIPE["model"] | {"num_class_embeds": 11, "class_embed_type": "timestep"}}, "class_embed_type"),
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
    ],
)
def test_bad_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", write_recipe(tmp_path, **changes)])


def test_models_as_flags():
    config = parse(["--model", '{"sample_size": 8}', "--scheduler", '{"num_train_timesteps": 5}'])[2]
    assert config.model == {"sample_size": 8}
    assert config.scheduler == {"num_train_timesteps": 5}
    assert not config.class_conditional


@pytest.mark.parametrize("name", ["ddpm_digits", "ddpm_cars", "ddpm_cifar10", "ddim_digits_class", "uvit_digits"])
def test_recipes_that_are_shipped(name):
    config, data, model = parse(["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
    assert config.output_dir.startswith("outputs/")
    assert model.class_conditional == (name in ("ddim_digits_class", "uvit_digits"))
    assert data.dataset_name


def test_the_digits_and_other_data():
    data = load_train_data(DataConfig(dataset_name="digits"), 1, 8)
    assert len(data) == 997
    assert data.num_classes == 10
    with pytest.raises(ValueError, match="no split 'dev', only .*'validation'"):
        load_train_data(DataConfig(dataset_name="digits", dataset_split="dev"), 1, 8)
    with pytest.raises(ValueError, match="no split 'dev', only .*'validation'"):
        open_split("digits", "dev")
    with pytest.raises(FileNotFoundError):
        load_train_data(DataConfig(dataset_name="./nowhere"), 1, 8)


# --- the committed model


def assert_recipe_of(model: Path, path: Path) -> None:
    """The card's recipe is that of the file, and can be run today."""
    on_card, shipped = recipe_on_card(model), read_recipe(path)
    parse_recipe((TrainingConfig, DataConfig, ModelConfig), [part for key, value in on_card.items()
                 for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))])  # fmt: skip
    assert {key: on_card[key] for key in shipped if key in on_card} == {
        key: value for key, value in shipped.items() if key in on_card
    }
    assert shipped.keys() - on_card.keys() <= {"output_dir"}
    assert f"Steps: {shipped['max_train_steps']:,} with seed {shipped['seed']}" in (model / "README.md").read_text()


def test_committed_model_is_what_its_card_says():
    weights = DIGITS_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert sum(path.stat().st_size for path in DIGITS_MODEL.rglob("*")) < 3_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert_recipe_of(DIGITS_MODEL, DIGITS_RECIPE)
    assert "split `train`, and no other" in (DIGITS_MODEL / "README.md").read_text()


def test_committed_model_predicts_the_noise_of_unseen_digits():
    """Far better than the best guess without an image, whose mean squared error is 1."""
    pipeline = DDPMPipeline.from_pretrained(DIGITS_MODEL)
    pixels = ImagePixels(open_split("digits", "test"), "image", channels=1, size=8, cache=False)
    images = torch.stack([pixels[index] for index in range(100)]).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (100,), generator=generator)
    with torch.no_grad():
        predicted = pipeline.unet(pipeline.scheduler.add_noise(images, noise, timesteps), timesteps).sample
    assert (predicted - noise).square().mean() < 0.2
