"""The scripts of distillation: a run of each, what it measures, saves and tells, and their recipes."""

import json
import warnings
from pathlib import Path

import make_digit_masks
import numpy as np
import pytest
import torch
import train_dreamteacher
import train_interpreter
import train_repfusion
import train_student
from datasets import load_dataset
from transformers import AutoModelForImageClassification

from diffusers_repr.config import parse_recipe
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.encoders import Encoder
from diffusers_repr.objectives import (
    DreamTeacherConfig,
    DreamTeacherObjective,
    FinetuneStudentConfig,
    RepFusionConfig,
    RepFusionObjective,
    StudentConfig,
)
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = str(EXAMPLES / "models" / "digits-ddpm")
STUDENT = {"model_type": "convnext", "patch_size": 1, "hidden_sizes": [8, 16], "depths": [1, 1],
           "layer_scale_init_value": 1.0}  # fmt: skip
KEYS = {f"{name}_{probe}" for name in ("student", "untrained", "teacher", "pixels") for probe in ("5_shot", "linear")}


def flags(**settings) -> list[str]:
    short = {"max_train_steps": 4, "train_batch_size": 8, "logging_steps": 1, "ema_max_decay": 0.5,
             "learning_rate": 0.01, "cache_images": True}  # fmt: skip
    given: list[str] = []
    for name, value in (short | settings).items():
        if isinstance(value, dict):
            value = json.dumps(value)
        given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return given


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("repfusion") / "out"
    given = flags(pretrained_model_name_or_path=DIGITS, dataset_name="digits", student=STUDENT, policy_levels=4,
                  dataset_split="validation", eval_split="test", output_dir=folder)  # fmt: skip
    with warnings.catch_warnings():  # features of four steps are far from separable
        warnings.filterwarnings("ignore", "The logistic regression stopped")
        told = run_script(train_repfusion.main, "train_repfusion", *given)
    return folder, told


def test_repfusion(distilled):
    folder, told = distilled
    log = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert {"feature", "task", "policy", "entropy", "reward", "mutual_information", "timestep"} <= set(log[-1])
    assert log[-1]["feature"] < log[0]["feature"]
    measured = json.loads((folder / "evaluation.jsonl").read_text())
    assert measured.keys() - {"step"} == KEYS
    assert measured["teacher_linear"] > 0.9
    assert measured["student_linear"] != measured["untrained_linear"]
    assert "Mutual information between image and level" in told.splitlines()[-1]
    card = (folder / "README.md").read_text()
    assert "Mutual information between image and level" in card
    assert "| mutual_information |" in card
    encoder = Encoder.from_pretrained(folder)
    assert encoder(load_digits_splits()["test"][:2]["image"]).tokens.shape == (2, 16, 16)


def test_tuning_what_was_distilled(distilled, tmp_path, monkeypatch):
    run_script(
        train_student.main, "train_student",
        *flags(student_name_or_path=distilled[0], dataset_name="digits", image_channels=1, resolution=8,
               eval_split="validation", output_dir=tmp_path / "out"),
    )  # fmt: skip
    measured = json.loads((tmp_path / "out" / "evaluation.jsonl").read_text())
    assert measured.keys() == {"step", "eval_loss", "eval_accuracy"}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label[7] == "7"
    validation = load_digits_splits()["validation"]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in validation["image"]])[:, None] / 127.5 - 1
    with torch.no_grad():
        right = loaded.eval()(pixels).logits.argmax(1) == torch.tensor(validation["label"])
    assert measured["eval_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    monkeypatch.chdir(tmp_path)  # where no run has left anything
    with pytest.raises(FileNotFoundError, match=r"This makes it: accelerate launch examples/train_repfusion\.py"):
        train_student.main(["--student_name_or_path", "outputs/digits-repfusion", "--dataset_name", "nowhere"])


def test_dreamteacher_with_an_interpreter(tmp_path, monkeypatch):
    """By the recipes, in a folder of its own: masks, an interpreter of them, a student that learns its labels too."""
    for name in ("interpreter", "dreamteacher_labels"):
        text = (EXAMPLES / "configs" / f"{name}_digits.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("examples/models/digits-ddpm", DIGITS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"interpreter: .*examples/train_interpreter\.py"):
        train_dreamteacher.main(["--config", "dreamteacher_labels.yaml"])
    with pytest.raises(FileNotFoundError, match="data/digit-masks"):
        train_interpreter.main(["--config", "interpreter.yaml"])
    make_digit_masks.main(["--train", "8", "--validation", "1", "--test", "20"])
    rows = load_dataset("data/digit-masks", split="train")
    for row, digit in zip(rows, load_digits_splits()["train"], strict=False):
        ink = np.array(digit["image"]) >= 128
        assert np.array_equal(np.array(row["mask"]), ink * (1 + digit["label"]))
    small = flags(width=8, groups=4)
    run_script(train_interpreter.main, "train_interpreter", "--config", "interpreter.yaml", *small)
    measured = json.loads(Path("outputs/digits-interpreter/evaluation.jsonl").read_text())
    assert measured.keys() == {"step", "eval_mean_iou", "eval_pixel_accuracy"}
    small = flags(student=STUDENT, width=8, eval_split="none")
    run_script(train_dreamteacher.main, "train_dreamteacher", "--config", "dreamteacher_labels.yaml", *small)
    folder = Path("outputs/digits-dreamteacher-labels")
    log = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"mse_1", "mse_2", "attention_1", "labels"} <= set(log[-1])
    assert not (folder / "evaluation.jsonl").exists()
    assert Encoder.from_pretrained(folder).dim == 16
    with pytest.raises(ValueError, match="Pixels need classes"):
        train_interpreter.main(["--pretrained_model_name_or_path", DIGITS])


def test_recipes(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    data, loop = DataConfig, TrainingConfig
    for name, settings, kind in (
        ("repfusion", RepFusionConfig, RepFusionObjective),
        ("dreamteacher", DreamTeacherConfig, DreamTeacherObjective),
    ):
        kinds = (loop, data, StudentConfig, settings, MeasuredSplit)
        _, _, student, config, _ = parse_recipe(kinds, ["--config", f"examples/configs/{name}_digits.yaml"])
        classes = {"num_classes": 10} if name == "repfusion" else {}
        assert kind(config.load_base(), student.build(1, (8, 8)), config, **classes).artifacts()
    kinds = (loop, data, StudentConfig, FinetuneStudentConfig, train_student.ImagesConfig)
    _, read, student, _, images = parse_recipe(kinds, ["--config", "examples/configs/student_digits.yaml"])
    assert (student.student_name_or_path, read.resolution, images.image_channels) == ("outputs/digits-repfusion", 8, 1)
