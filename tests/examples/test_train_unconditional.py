import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMPipeline, UNet2DModel
from image_batches import ImagePixels, augment, batch_indices, load_split
from PIL import Image
from safetensors.torch import load_file
from train_unconditional import Progress, TrainingArgs, learning_rate, main, parse_args, read_log

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "ddpm_digits.yaml"
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
    "max_train_steps": 6,
    "learning_rate": 0.01,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 10,
    "logging_steps": 2,
    "ema_max_decay": 0.5,
    "seed": 7,
    "save_dtype": "float16",
    "eval_batch_size": 8,
    "ddpm_num_inference_steps": 2,
}


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def launch_command(config: str, output: Path, *flags: str, processes: int = 1) -> list[str]:
    options = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    script = [str(EXAMPLES / "train_unconditional.py"), "--config", config, "--output_dir", str(output), *flags]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *script]


def environment() -> dict:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(*args, **kwargs) -> str:
    done = subprocess.run(launch_command(*args, **kwargs), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def assert_same_tensors(first: Path, second: Path) -> None:
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run of six steps with a checkpoint after each, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    config = write_recipe(folder)
    launch(config, folder / "whole")
    return folder / "whole", config


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state; one thread, as tiny models gain nothing by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_here(folder: Path, name: str = "out", **changes) -> Path:
    main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / name)])
    return folder / name


def noiseless_loss(model, scheduler, images):
    return model(images, 0).sample.square().mean()


def as_flags(recipe: dict) -> list[str]:
    given = {key: value for key, value in recipe.items() if value is not None}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


# --- launched runs


def test_saved_folder_is_a_pipeline(finished):
    output, _ = finished
    pipeline = DDPMPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    weights = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(output / "checkpoint-00000006" / "ema.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, averaged[name].half()), name
    assert Image.open(output / "samples.png").size == (8 * 32, 32)


def test_log_and_card(finished):
    output, _ = finished
    lines = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "diffusers"
    assert front["license"] == "apache-2.0"
    for expected in (
        "split `train`",
        "Steps: 6",
        "seed 7",
        f"{lines[-1]['loss']:.4f}",
        "float16",
        "learning_rate: 0.01",
    ):
        assert expected in card
    assert str(output.parent) not in card


def test_ema_equals_a_plain_loop(finished):
    output, config = finished
    torch.manual_seed(RECIPE["seed"])
    average = {name: p.detach().double() for name, p in UNet2DModel(**RECIPE["model"]).named_parameters()}
    for n in range(6):
        decay = 0.0 if n == 0 else min(RECIPE["ema_max_decay"], (1 + n) / (10 + n))
        weights = load_file(output / f"checkpoint-{n + 1:08d}" / "model.safetensors")
        average = {name: decay * old + (1 - decay) * weights[name].double() for name, old in average.items()}
        saved = load_file(output / f"checkpoint-{n + 1:08d}" / "ema.safetensors")
        for name, expected in average.items():
            torch.testing.assert_close(saved[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_resume_is_bit_exact(finished, tmp_path):
    """As after a kill in step 6: the last checkpoint kept is that of step 3, the log went on, a write was cut."""
    output, config = finished
    resumed = tmp_path / "whole"
    shutil.copytree(output / "checkpoint-00000003", resumed / "checkpoint-00000003")
    shutil.copytree(output / "checkpoint-00000001", resumed / "partial-checkpoint-00000004")
    (resumed / "loss.jsonl").write_text((output / "loss.jsonl").read_text() + '{"step": 5, "lo')
    said = launch(config, resumed)
    assert "steps 3 to 6" in said
    for name in ("model", "ema"):
        assert_same_tensors(*(run / "checkpoint-00000006" / f"{name}.safetensors" for run in (output, resumed)))
    first, second = (torch.load(run / "checkpoint-00000006" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
                     for run in (output, resumed))  # fmt: skip
    assert all(torch.equal(first[i][key], second[i][key]) for i in first for key in first[i])
    logs = [[json.loads(line) for line in (run / "loss.jsonl").open()] for run in (output, resumed)]
    assert [(line["step"], line["loss"]) for line in logs[0]] == [(line["step"], line["loss"]) for line in logs[1]]
    assert (output / "README.md").read_text() == (resumed / "README.md").read_text()


def test_two_processes(tmp_path):
    output = tmp_path / "two"
    said = launch(write_recipe(tmp_path, max_train_steps=2), output, processes=2)
    assert "2 processes, 16 of 997 images a step" in said  # 2 processes x 2 micro-batches x 4 images
    state = json.loads((output / "checkpoint-00000002" / "state.json").read_text())
    assert state["identity"]["num_processes"] == 2
    assert state["progress"]["step"] == 2
    assert (output / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert len((output / "loss.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_repeated_kills_lose_nothing(finished, tmp_path):
    """SIGKILL at arbitrary moments, the same command again each time: the weights of an undisturbed run."""
    _, config = finished
    flags = ["--max_train_steps", "300", "--checkpointing_steps", "7", "--logging_steps", "5",
             "--checkpoints_total_limit", "2", "--eval_batch_size", "0"]  # fmt: skip
    launch(config, tmp_path / "plain", *flags)
    generator = np.random.default_rng(0)
    for _ in range(6):
        process = subprocess.Popen(
            launch_command(config, tmp_path / "killed", *flags),
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seen = sorted((tmp_path / "killed").glob("checkpoint-*"))
        deadline = time.monotonic() + 120
        while sorted((tmp_path / "killed").glob("checkpoint-*")) == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    launch(config, tmp_path / "killed", *flags)
    last = "checkpoint-00000300"
    for name in ("model", "ema"):
        assert_same_tensors(*(tmp_path / run / last / f"{name}.safetensors" for run in ("plain", "killed")))
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2
    logs = [[json.loads(line) for line in (tmp_path / run / "loss.jsonl").open()] for run in ("plain", "killed")]
    assert [(line["step"], line["loss"]) for line in logs[0]] == [(line["step"], line["loss"]) for line in logs[1]]


# --- runs in this process


@pytest.mark.usefixtures("fresh_accelerate")
class TestRun:
    def test_accumulation_equals_a_larger_batch(self, tmp_path, monkeypatch):
        monkeypatch.setattr("train_unconditional.diffusion_loss", noiseless_loss)
        quiet = {"model": RECIPE["model"] | {"dropout": 0.0}, "random_rotation": 0.0, "random_shift": 0.0,
                 "max_train_steps": 2, "learning_rate": 1e-3, "eval_batch_size": 0}  # fmt: skip
        for name, batch, accumulation in (("parts", 2, 4), ("whole", 8, 1)):
            run_here(tmp_path, name, train_batch_size=batch, gradient_accumulation_steps=accumulation, **quiet)
            GradientState._reset_state()
            AcceleratorState._reset_state()
        parts, whole = (
            load_file(tmp_path / name / "checkpoint-00000002/ema.safetensors") for name in ("parts", "whole")
        )
        for name, tensor in parts.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-4)

    def test_a_loss_that_is_not_finite_is_skipped_and_counted(self, tmp_path, monkeypatch):
        calls = []

        def loss(model, scheduler, images):
            calls.append(None)
            return noiseless_loss(model, scheduler, images) * (math.nan if len(calls) == 2 else 1)

        monkeypatch.setattr("train_unconditional.diffusion_loss", loss)
        output = run_here(tmp_path, gradient_accumulation_steps=1, max_train_steps=3, eval_batch_size=0)
        assert_same_tensors(*(output / f"checkpoint-0000000{n}" / "model.safetensors" for n in (1, 2)))
        assert_same_tensors(*(output / f"checkpoint-0000000{n}" / "ema.safetensors" for n in (1, 2)))
        third = load_file(output / "checkpoint-00000003" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in third.values())
        assert json.loads((output / "loss.jsonl").read_text().splitlines()[-1])["skipped"] == 1
        assert "1 skipped" in (output / "README.md").read_text()

    def test_only_such_losses_stop_the_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr("train_unconditional.MAX_SKIPPED_IN_A_ROW", 3)
        monkeypatch.setattr("train_unconditional.diffusion_loss", lambda *given: noiseless_loss(*given) * math.inf)
        with pytest.raises(RuntimeError, match="learning_rate"):
            run_here(tmp_path)

    @pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
    def test_prediction_types_and_images_of_a_folder(self, tmp_path, kind):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3), dtype=np.uint8)
        features = datasets.Features({"photo": datasets.Image()})
        data = datasets.Dataset.from_dict({"photo": [Image.fromarray(image) for image in pixels]}, features=features)
        data.to_parquet(tmp_path / "data" / "train.parquet")
        output = run_here(
            tmp_path,
            dataset_name=str(tmp_path / "data"),
            image_column="photo",
            model=RECIPE["model"] | {"in_channels": 3, "out_channels": 3},
            scheduler={"prediction_type": kind},
            random_flip=True,
            max_train_steps=1,
            mixed_precision="bf16",
        )
        assert DDPMPipeline.from_pretrained(output).scheduler.config.prediction_type == kind

    def test_a_finished_run_is_left_as_it_is(self, finished, tmp_path):
        output, config = finished
        again = shutil.copytree(output, tmp_path / "whole")
        main(["--config", config, "--output_dir", str(again)])
        assert (again / "README.md").read_bytes() == (output / "README.md").read_bytes()
        assert_same_tensors(*(run / "unet/diffusion_pytorch_model.safetensors" for run in (again, output)))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--seed", "8"], r"of a run with \{'seed': 7\}"),
            (["--resume_from_checkpoint", "none"], "another --output_dir"),
            (["--max_train_steps", "3"], r"of a run with \{'max_train_steps': 6\}"),
        ],
    )
    def test_checkpoints_that_do_not_fit(self, finished, flags, message):
        output, config = finished
        with pytest.raises(ValueError, match=message):
            main(["--config", config, "--output_dir", str(output), *flags])

    def test_a_checkpoint_past_the_end(self, tmp_path):
        run_here(tmp_path, lr_scheduler="constant", max_train_steps=2, eval_batch_size=0)
        with pytest.raises(ValueError, match="past --max_train_steps 1"):
            run_here(tmp_path, lr_scheduler="constant", max_train_steps=1, eval_batch_size=0)


# --- recipes


def test_recipe_and_overrides(tmp_path):
    args = parse_args(["--config", write_recipe(tmp_path), "--output_dir", "out", "--seed", "3", "--random_flip"])
    assert args.seed == 3
    assert args.random_flip is True
    assert args.learning_rate == 0.01
    assert args.model == RECIPE["model"]
    text = write_recipe(tmp_path, learning_rate="1e-3")  # YAML reads 1e-3 as text
    assert parse_args(["--config", text, "--output_dir", "out"]).learning_rate == 1e-3
    assert parse_args(["--output_dir", "out", "--model", '{"sample_size": 8}']).model == {"sample_size": 8}


def test_dry_run_prints_the_recipe(tmp_path, capsys):
    main(["--config", str(DIGITS_RECIPE), "--dry_run", "--seed", "5", "--output_dir", str(tmp_path / "none")])
    printed = capsys.readouterr().out
    recipe = yaml.safe_load(printed)
    assert recipe["seed"] == 5
    assert parse_args(["--output_dir", "out", *as_flags(recipe)]) == dataclasses.replace(
        parse_args(["--config", str(DIGITS_RECIPE)]), output_dir="out", seed=5
    )
    assert "# 701,345 parameters" in printed
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "Unknown key 'learning_rat' in .*Closest allowed: .'learning_rate'"),
        ({"model": {"sample_sise": 8}}, "Unknown key 'sample_sise' in `model`.*'sample_size'"),
        ({"scheduler": {"betas": 1}}, "Unknown key 'betas' in `scheduler`"),
        ({"model": {}}, "needs `sample_size`"),
        ({"model": [8]}, "must be a mapping of UNet2DModel's arguments"),
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
        ({"eval_batch_size": 5}, "multiple of 8"),
    ],
)
def test_bad_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", "out"])


def test_bad_values_name_the_flag(tmp_path, capsys):
    for changes, message in (
        ({"seed": "many"}, "--seed: invalid int"),
        ({"lr_scheduler": "linear"}, "--lr_scheduler"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", "out"])
        assert message in capsys.readouterr().err


def test_missing_recipe_lists_the_known_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="No recipe 'nothing.yaml'.*ddpm_digits.yaml"):
        parse_args(["--config", "nothing.yaml"])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds a list; a recipe is a mapping"):
        parse_args(["--config", str(tmp_path / "list.yaml")])


def test_unknown_flags_are_errors():
    with pytest.raises(ValueError, match="--learning_rat"):
        parse_args(["--output_dir", "out", "--model", '{"sample_size": 8}', "--learning_rat", "1"])


@pytest.mark.parametrize("lr_scheduler", ["constant", "cosine"])
def test_learning_rate(lr_scheduler):
    args = TrainingArgs("out", model={"sample_size": 8}, lr_scheduler=lr_scheduler, learning_rate=2.0,
                        lr_warmup_steps=4, max_train_steps=12)  # fmt: skip
    rates = [learning_rate(args, step) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    if lr_scheduler == "constant":
        assert rates[4:] == [2.0] * 8
    else:
        assert rates[8] == pytest.approx(1.0)
        assert 0 < rates[11] < 0.1


def test_log_of_a_killed_run(tmp_path):
    assert read_log(tmp_path / "none.jsonl", 5) == []
    (tmp_path / "loss.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    assert read_log(tmp_path / "loss.jsonl", 4) == [{"step": 2}, {"step": 4}]


# --- data


def test_every_epoch_shows_every_image_once_however_many_ranks():
    alone = batch_indices(10, seed=1, first=0, size=4, stride=4)
    whole = [index for _ in range(5) for index in next(alone)]
    assert sorted(whole[:10]) == sorted(whole[10:]) == list(range(10))
    assert whole[:10] != whole[10:]
    ranks = [batch_indices(10, seed=1, first=2 * rank, size=2, stride=4) for rank in range(2)]
    assert [index for _ in range(5) for rank in ranks for index in next(rank)] == whole
    later = batch_indices(10, seed=1, first=12, size=4, stride=4)
    assert next(later) == whole[12:16]


def test_images_are_cropped_at_the_centre(tmp_path):
    image = Image.new("RGB", (20, 12))
    image.paste((255, 0, 0), (4, 0, 16, 12))
    data = datasets.Dataset.from_dict({"image": [image]}, features=datasets.Features({"image": datasets.Image()}))
    for cache in (False, True):
        pixels = ImagePixels(data, "image", channels=3, size=6, cache=cache)
        assert pixels[0].dtype == torch.uint8
        assert pixels[0][0].min() > 200  # the black margins are cut off, but for the filter's reach
        assert pixels[0][1:].max() == 0
    assert ImagePixels(data, "image", channels=1, size=(4, 6), cache=False)[0].shape == (1, 4, 6)


def test_unusable_data():
    data = load_split("digits", "validation")
    with pytest.raises(ValueError, match="No column 'photo' of type Image in .*'image'.*--image_column"):
        ImagePixels(data, "photo", channels=1, size=8, cache=False)
    with pytest.raises(ValueError, match="No column 'label' of type Image"):
        ImagePixels(data, "label", channels=1, size=8, cache=False)
    with pytest.raises(ValueError, match="has no image"):
        ImagePixels(data.select([]), "image", channels=1, size=8, cache=False)
    with pytest.raises(ValueError, match="in_channels=2"):
        ImagePixels(data, "image", channels=2, size=8, cache=False)
    with pytest.raises(ValueError, match="no split 'dev', only .*'validation'"):
        load_split("digits", "dev")


def test_augment():
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert augment(images, False, 0.0, 0.0, 0.0) is images
    flipped = augment(images, True, 0.0, 0.0, 0.0)
    for before, after in zip(images, flipped, strict=True):
        assert any(torch.allclose(after, choice, atol=1e-5) for choice in (before, before.flip(-1)))
    assert not torch.allclose(flipped, images)
    changed = augment(images, False, 20.0, 0.1, 0.1)
    assert changed.min() >= -1
    assert changed.max() <= 1
    black = torch.full((16, 1, 8, 8), -1.0)
    assert torch.allclose(augment(black, True, 45.0, 0.5, 0.3), black)
    moved = augment(torch.ones(256, 1, 8, 8), False, 0.0, 0.25, 0.0)  # by up to two pixels
    assert moved[..., 2:6, 2:6].min() > 0.99
    assert moved[..., 0, :].min() < -0.9


# --- the committed model


def test_committed_model_is_what_its_card_says():
    weights = DIGITS_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert sum(path.stat().st_size for path in DIGITS_MODEL.rglob("*")) < 3_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    card = (DIGITS_MODEL / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert parse_args(["--output_dir", "outputs/digits-ddpm", *as_flags(recipe)]) == parse_args(
        ["--config", str(DIGITS_RECIPE)]
    )
    assert f"Steps: {recipe['max_train_steps']:,} with seed {recipe['seed']}" in card
    assert "split `train`, and no other" in card


def test_committed_model_predicts_the_noise_of_unseen_digits():
    """Far better than the best guess without an image, whose mean squared error is 1."""
    pipeline = DDPMPipeline.from_pretrained(DIGITS_MODEL)
    pixels = ImagePixels(load_split("digits", "test"), "image", channels=1, size=8, cache=False)
    images = torch.stack([pixels[index] for index in range(100)]).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (100,), generator=generator)
    with torch.no_grad():
        predicted = pipeline.unet(pipeline.scheduler.add_noise(images, noise, timesteps), timesteps).sample
    assert (predicted - noise).square().mean() < 0.2


def test_progress_survives_json():
    progress = Progress(step=3, skipped=1, loss_sum=0.1 + 0.2, loss_count=2)
    assert Progress(**json.loads(json.dumps(vars(progress)))) == progress
