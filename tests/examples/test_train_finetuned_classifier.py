"""`train_finetuned_classifier.py`: a run, what it measures and saves, and its recipe."""

import json
from pathlib import Path

import pytest
import train_finetuned_classifier
from diffusers import DDPMPipeline

from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.objectives import FinetuneConfig
from diffusers_repr.tasks import Probe, finetuned_probe
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def test_a_run(tmp_path, monkeypatch):
    """It learns; the folder is a pipeline and a probe, and both say the same; the card tells what was measured."""
    monkeypatch.chdir(CONFIGS.parents[1])
    out, recipe = tmp_path / "out", CONFIGS / "finetuned_digits.yaml"
    flags = ["--max_train_steps", "12", "--train_batch_size", "32", "--lr_warmup_steps", "0", "--output_dir", str(out)]
    more = ["--network_lr_scale", "1", "--ema_max_decay", "0", "--logging_steps", "5"]
    run_script(train_finetuned_classifier.main, "train_finetuned_classifier", "--config", str(recipe), *flags, *more)
    log = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert DDPMPipeline.from_pretrained(out).unet.config.sample_size == 8
    test = load_digits_splits()["test"]
    probe, again = finetuned_probe(out), Probe.from_pretrained(out / "probe")
    found = probe.evaluate(test)
    assert found == again.evaluate(test)
    measured = json.loads((out / "evaluation.jsonl").read_text())
    assert measured["eval_accuracy"] == pytest.approx(found["accuracy"], abs=0.03)  # of another draw of noise
    assert found["accuracy"] > 0.5
    assert probe.recipe.train == {"dataset": "digits", "split": "train", "rows": 997}
    assert json.loads((out / "probe" / "probe.json").read_text())["base"]["name"] == ".."
    card = (out / "README.md").read_text()
    assert 'finetuned_probe("out")' in card
    assert "image-classification" in card


def test_recipe_and_bad_input(monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    kinds = (TrainingConfig, DataConfig, FinetuneConfig)
    _, _, config = parse_recipe(kinds, ["--config", str(CONFIGS / "finetuned_digits.yaml")])
    assert Path(config.pretrained_model_name_or_path).is_dir()
    with pytest.raises(ValueError, match="No base; pass"):
        train_finetuned_classifier.main(["--dataset_name", "digits"])
    with pytest.raises(ValueError, match="The data have no classes"):
        train_finetuned_classifier.main(
            ["--config", str(CONFIGS / "finetuned_digits.yaml"), "--label_column", "none", "--eval_split", "none"]
        )
