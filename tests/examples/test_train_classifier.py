import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from classifier_args import ClassifierArgs, parse_args
from classifier_base import Base, add_up, averages
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from train_classifier import main

from diffusers_repr import Denoiser, NoiseSchedule
from diffusers_repr.hub import HubError
from diffusers_repr.models import NoisyClassifier
from tests.testers.hub_server import hub_env, hub_server
from tests.testers.models import saved

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "classifier_digits.yaml"
DIGITS_MODEL = EXAMPLES / "models" / "digits-ddpm"
RECIPE = {
    "pretrained_model_name_or_path": str(DIGITS_MODEL),
    "dataset_name": "digits",
    "eval_split": "validation",
    "random_rotation": 10.0,
    "random_shift": 0.1,
    "model": {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8, "dropout": 0.1},
    "train_batch_size": 8,
    "max_train_steps": 6,
    "learning_rate": 0.003,
    "lr_warmup_steps": 2,
    "noise_bins": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 10,
    "logging_steps": 2,
    "seed": 7,
    "save_dtype": "float16",
}
STEPS = ("step", "loss", "accuracy", "loss_by_bin", "accuracy_by_bin")  # of a log line, without its speed


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def launch(config: str, output: Path, *flags: str, processes: int = 1, env: dict | None = None) -> str:
    options = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    script = [str(EXAMPLES / "train_classifier.py"), "--config", config, "--output_dir", str(output), *flags]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    env = (env or os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run of six steps with a checkpoint after each, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    config = write_recipe(folder)
    launch(config, folder / "whole")
    return folder / "whole", config


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_here(folder: Path, name: str = "out", **changes) -> Path:
    main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / name)])
    return folder / name


# --- launched runs


def test_saved_folder_is_a_classifier_of_its_base(finished):
    output, _ = finished
    model = NoisyClassifier.from_pretrained(output)
    assert model.labels == [str(digit) for digit in range(10)]
    assert (model.config.in_channels, model.config.sample_size, model.config.base_model) == (1, 8, "digits-ddpm")
    base = Denoiser.from_pretrained(DIGITS_MODEL)
    model.check_base(base.schedule, 1)
    with pytest.raises(ValueError, match="'digits-ddpm' on the process vp .*; the base has flow"):
        model.check_base(NoiseSchedule("flow", "velocity"), 1)
    trained = load_file(output / "checkpoint-00000006" / "model.safetensors")
    weights = load_file(output / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, trained[name].half()) for name, tensor in weights.items())


def test_log_card_and_evaluation(finished):
    output, _ = finished
    lines = read_lines(output)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) and len(line["loss_by_bin"]) == 2 for line in lines)
    scores = json.loads((output / "evaluation.json").read_text())
    assert (scores["images"], scores["split"], scores["timesteps"]) == (300, "validation", [0.0, 500.0, 999.0])
    assert scores["accuracy"] == pytest.approx(sum(scores["accuracy_by_bin"]) / 2)
    card = ModelCard((output / "README.md").read_text())
    assert card.data.eval_results[0].metric_value == scores["accuracy"]
    assert {"classifier-guidance", "image-classification"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder cannot be linked
    for expected in ("`digits-ddpm`", "500 to 999", "split `train`", "Steps: 6", "seed 7", "learning_rate: 0.003"):
        assert expected in card.text
    assert str(EXAMPLES) not in card.text
    assert str(output.parent) not in card.text


def test_resume_is_bit_exact(finished, tmp_path):
    """As after a kill in step 6: the last checkpoint kept is that of step 3, the log went on, a write was cut."""
    output, config = finished
    resumed = tmp_path / "whole"
    shutil.copytree(output / "checkpoint-00000003", resumed / "checkpoint-00000003")
    shutil.copytree(output / "checkpoint-00000004", resumed / ".checkpoint-00000004.cut.tmp")
    (resumed / "loss.jsonl").write_text((output / "loss.jsonl").read_text() + '{"step": 5, "lo')
    assert "steps 3 to 6" in launch(config, resumed)
    first, second = (load_file(run / "checkpoint-00000006" / "model.safetensors") for run in (output, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    first, second = (load_file(run / "checkpoint-00000006" / "optimizer.safetensors") for run in (output, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    first, second = ([[line[key] for key in STEPS] for line in read_lines(run)] for run in (output, resumed))
    assert first == second
    for name in ("README.md", "evaluation.json"):
        assert (output / name).read_text() == (resumed / name).read_text()


def test_two_processes(tmp_path):
    said = launch(write_recipe(tmp_path, max_train_steps=2, eval_split="none"), tmp_path / "two", processes=2)
    assert "16 of 997 images a step" in said
    assert [line["step"] for line in read_lines(tmp_path / "two")] == [2]
    assert "It was not measured" in (tmp_path / "two" / "README.md").read_text()
    assert NoisyClassifier.from_pretrained(tmp_path / "two").num_parameters() > 0


def test_push(finished, tmp_path):
    output, config = finished
    again = shutil.copytree(output, tmp_path / "whole")
    with hub_server() as server:
        flags = ["--push_to_hub", "--hub_model_id", "user/digits-classifier"]
        launch(config, again, *flags, env=hub_env(server, tmp_path))
        repo = server.store.repos["model", "user/digits-classifier"]
        files = repo.commits[repo.branches["main"]]
    expected = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "evaluation.json", "loss.jsonl"}
    assert expected <= set(files) <= expected | {".gitattributes"}


# --- runs in this process


@pytest.mark.usefixtures("fresh_accelerate")
class TestRun:
    def test_it_learns(self, tmp_path):
        output = run_here(
            tmp_path,
            model=RECIPE["model"] | {"block_out_channels": [16, 32], "attention_head_dim": 16, "dropout": 0.0},
            random_rotation=0.0,
            random_shift=0.0,
            train_batch_size=64,
            max_train_steps=200,
            lr_warmup_steps=10,
            noise_bins=5,
            cache_images=True,
            checkpointing_steps=200,
            logging_steps=50,
        )
        scores = json.loads((output / "evaluation.json").read_text())
        assert scores["accuracy_by_bin"][0] > 0.7  # chance is 0.1
        assert scores["accuracy_by_bin"][4] < scores["accuracy_by_bin"][0] - 0.2  # little is left to see
        lines = read_lines(output)
        assert lines[-1]["loss_by_bin"][0] < 0.6 * lines[0]["loss_by_bin"][0]

    @pytest.mark.parametrize(("family", "kind", "channels"), [("sd", "vp", 4), ("sd3", "flow", 4)])
    def test_latents_and_images_of_a_folder(self, tmp_path, family, kind, channels):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3), dtype=np.uint8)
        features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
        columns = {"photo": [Image.fromarray(image) for image in pixels], "kind": [0, 1, 0, 1, 1]}
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        data.to_parquet(tmp_path / "data" / "train.parquet")
        folder = saved(family)
        output = run_here(
            tmp_path,
            pretrained_model_name_or_path=str(folder),
            dataset_name=str(tmp_path / "data"),
            eval_split="train",
            image_column="photo",
            label_column="kind",
            random_flip=True,
            max_train_steps=1,
            mixed_precision="bf16",
        )
        model, base = NoisyClassifier.from_pretrained(output), Denoiser.from_pretrained(folder)
        assert model.labels == ["cat", "dog"]
        assert model.config.noise_schedule["kind"] == kind
        assert model.config.sample_size == base.image_size[0] // base.stride
        model.check_base(base.schedule, channels, base.vae.config.scaling_factor)
        with pytest.raises(ValueError, match="latents"):
            model.check_base(base.schedule, channels, 1.5 * base.vae.config.scaling_factor)

    def test_a_loss_that_is_not_finite_ends_the_run(self, tmp_path):
        with pytest.raises(RuntimeError, match="not finite. Lower the learning_rate"):
            run_here(tmp_path, learning_rate=1e20, max_train_steps=20, lr_warmup_steps=0)

    def test_a_finished_run_is_left_as_it_is(self, finished, tmp_path):
        output, config = finished
        again = shutil.copytree(output, tmp_path / "whole")
        main(["--config", config, "--output_dir", str(again)])
        for name in ("README.md", "diffusion_pytorch_model.safetensors", "evaluation.json"):
            assert (again / name).read_bytes() == (output / name).read_bytes(), name

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

    def test_a_checkpoint_of_another_base(self, finished, tmp_path):
        output, config = finished
        other = shutil.copytree(DIGITS_MODEL, tmp_path / "other")
        scheduler = other / "scheduler" / "scheduler_config.json"
        scheduler.write_text(scheduler.read_text().replace("squaredcos_cap_v2", "linear"))
        with pytest.raises(ValueError, match="of a run with {'base': "):
            main(["--config", config, "--output_dir", str(output), "--pretrained_model_name_or_path", str(other)])

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"pretrained_model_name_or_path": "./nowhere"}, FileNotFoundError, "pipeline folder or a Hub id"),
            ({"dataset_split": "trian"}, ValueError, "no split 'trian'"),
            ({"eval_split": "trian"}, ValueError, "no split 'trian'"),
            ({"label_column": "image"}, ValueError, "No column 'image' of type ClassLabel.*--label_column"),
            ({"image_column": "label"}, ValueError, "No column 'label' of type Image"),
            ({"resolution": 7}, ValueError, "takes multiples of 2"),
            ({"model": {"norm_num_groups": 5}}, ValueError, "multiple of norm_num_groups=5"),
        ],
    )
    def test_bad_bases_and_data(self, tmp_path, changes, error, message):
        with pytest.raises(error, match=message):
            run_here(tmp_path, **changes)
        assert not (tmp_path / "out").exists()

    def test_a_push_without_a_token_fails_before_training(self, tmp_path, monkeypatch):
        monkeypatch.setattr("train_classifier.get_token", lambda: None)
        with pytest.raises(HubError, match="needs a token"):
            run_here(tmp_path, push_to_hub=True, hub_model_id="user/name")
        assert not (tmp_path / "out").exists()


# --- recipes


def test_dry_run_prints_the_recipe(tmp_path, capsys):
    main(["--config", str(DIGITS_RECIPE), "--dry_run", "--seed", "5", "--output_dir", str(tmp_path / "none")])
    recipe = yaml.safe_load(capsys.readouterr().out)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe))
    expected = dataclasses.replace(parse_args(["--config", str(DIGITS_RECIPE)]), output_dir="out", seed=5)
    assert parse_args(["--config", str(again), "--output_dir", "out"]) == expected
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "Unknown key 'learning_rat' in .*Closest allowed: .'learning_rate'"),
        ({"model": {"poling": "mean"}}, "Unknown key 'poling' in `model`.*'pooling'"),
        (
            {"model": {"num_classes": 10}},
            r"`model` sets \['num_classes'\], which the pipeline and",
        ),
        ({"model": [8]}, "must be a mapping of NoisyClassifier's arguments"),
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
        ({"noise_bins": 0}, "`noise_bins` must be positive"),
        ({"resolution": -8}, "`resolution` must be positive"),
        ({"push_to_hub": True}, "needs `hub_model_id`"),
        ({"push_to_hub": True, "hub_model_id": "name"}, "user/name; got 'name'"),
    ],
)
def test_bad_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", "out"])


def test_missing_recipe_lists_the_known_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="No recipe .*nothing.yaml.*classifier_digits.yaml"):
        parse_args(["--config", str(DIGITS_RECIPE.with_name("nothing.yaml"))])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds a list; a recipe is a mapping"):
        parse_args(["--config", str(tmp_path / "list.yaml")])


# --- noise levels and sums


def test_timesteps_of_each_process():
    def timesteps(schedule):
        return Base("", None, schedule, 1, 1, (8, 8), 1, None).timesteps(torch.tensor([0.0, 0.0004, 0.5, 0.9999999]))

    table = torch.linspace(-1e-4, -10, 1000, dtype=torch.float64)
    assert timesteps(NoiseSchedule("vp", "epsilon", 1000, table)).tolist() == [0, 0, 500, 999]
    assert timesteps(NoiseSchedule("flow", "velocity", 100)).tolist() == pytest.approx([0, 0.04, 50, 100])
    sigmas = {"sigma_min": 0.01, "sigma_max": 100.0}
    assert timesteps(NoiseSchedule("ve", "score", **sigmas))[2].item() == pytest.approx(1.0)
    assert (timesteps(NoiseSchedule("edm", "edm", **sigmas))[2] * 4).exp().item() == pytest.approx(1.0, abs=1e-5)
    for kind, output in (("ve", "score"), ("edm", "edm"), ("flow", "velocity")):
        schedule = NoiseSchedule(kind, output, **sigmas)
        drawn = timesteps(schedule)
        assert bool((schedule.resolve(drawn).nsr.diff() > 0).all())  # least noise first, all within the range


def test_whole_timesteps_are_equally_likely():
    base = Base("", None, NoiseSchedule("vp", "epsilon", 4, torch.linspace(-0.1, -3, 4)), 1, 1, (8, 8), 1, None)
    drawn = base.timesteps(torch.rand(40000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(drawn.long()).tolist() == pytest.approx([10000] * 4, rel=0.05)


def test_sums_and_averages():
    losses, correct = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])
    sums = add_up(torch.tensor([0, 2, 2]), losses, correct, 3)
    assert sums.tolist() == [[1, 1, 1], [0, 0, 0], [2, 6, 1]]
    told = averages(sums)
    assert told["loss"] == pytest.approx(7 / 3)
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["loss_by_bin"] == [1.0, None, 3.0]
    assert told["accuracy_by_bin"] == [1.0, None, 0.5]


def test_settings_that_decide_no_weight_are_no_part_of_a_run():
    args = ClassifierArgs("out", "base")
    for changes in ({"save_dtype": "float16"}, {"pretrained_model_name_or_path": "moved"}, {"logging_steps": 7}):
        assert dataclasses.replace(args, **changes).identity() == args.identity()
    for changes in ({"random_flip": True}, {"noise_bins": 7}, {"max_train_steps": 7}):
        assert dataclasses.replace(args, **changes).identity() != args.identity()
