"""`train_probe.py`: a run with each kind of features, the probe it leaves, and the recipes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import train_probe

from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.heads import FeedbackHead
from diffusers_repr.objectives import ProbeConfig
from diffusers_repr.tasks import Probe, prepare_probe
from diffusers_repr.training import TrainingConfig, make_accelerator, train
from tests.examples.scripts import run_script
from tests.tasks.planted import pipeline
from tests.training.loop_cases import forget_accelerate

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SMALL = ["--head_options", json.dumps({"width": 16, "num_attention_heads": 2}), "--logging_steps", "4"]


def run(name, out, epochs, *flags):
    changes = json.dumps({"epochs": epochs, "batch_size": 64, "learning_rate": 0.05 if name == "diffeed" else 0.1})
    run_script(train_probe.main, "train_probe", "--config", str(CONFIGS / f"probe_digits_{name}.yaml"),
               "--output_dir", str(out), "--protocol_changes", changes, *SMALL, *flags)  # fmt: skip


@pytest.mark.parametrize("name", ["difformer", "diffeed"])
def test_a_run(name, tmp_path, monkeypatch):
    """It learns; the folder is a `Probe` that predicts what was measured, is saved again and refuses another base."""
    monkeypatch.chdir(CONFIGS.parents[1])
    out = tmp_path / "out"
    flags = ["--timesteps", "50", "--layers", "up_blocks.0.attentions.1", "--cache_draws", "1",
             "--feature_cache", str(tmp_path / "features")] if name == "difformer" else []  # fmt: skip
    run(name, out, 1, *flags)
    log = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    measured = json.loads((out / "evaluation.jsonl").read_text())
    probe, test = Probe.from_pretrained(out), load_digits_splits()["test"]
    assert (type(probe.head) is FeedbackHead) == (name == "diffeed")
    assert probe.evaluate(test, record=False)["accuracy"] == pytest.approx(measured["eval_accuracy"])
    recipe = json.loads((out / "probe.json").read_text())
    assert recipe["scores"][0]["value"] == measured["eval_accuracy"]
    assert recipe["protocol"]["changed"] == ["learning_rate", "batch_size", "epochs"]
    assert recipe["base"]["local"]
    probe.save_pretrained(tmp_path / "again")
    pictures = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        Probe.from_pretrained(tmp_path / "again")(pictures).probabilities, probe(pictures).probabilities
    )
    with pytest.raises(ValueError, match="channels|values|layer"):
        Probe.from_pretrained(out, base=pipeline())
    card = (out / "README.md").read_text()
    assert 'Probe.from_pretrained("out")' in card
    assert "image-classification" in card


def cached_run(out, inputs, batch_size):
    """Losses and measures of a linear probe on features that all processes compute once, `batch_size` a process."""
    config, data, probe = parse_recipe((TrainingConfig, DataConfig, ProbeConfig), [str(part) for part in (
        "--pretrained_model_name_or_path", inputs / "ddpm", "--dataset_name", inputs / "pets", "--output_dir", out,
        "--head", "linear", "--layers", "mid_block", "--timesteps", 100, "--feature_cache", out / "features",
        "--cache_dtype", "float32", "--train_batch_size", batch_size, "--max_train_steps", 6, "--logging_steps", 1,
        "--learning_rate", 0.05, "--lr_warmup_steps", 0, "--eval_split", "test",
    )])  # fmt: skip
    config = dataclasses.replace(config, eval_batch_size=0)
    made = prepare_probe(config, data, probe)
    accelerator = make_accelerator(made.config, False)  # of this run: the two processes go on
    train(made.objective, made.data, made.config, evaluate=made.evaluate, accelerator=accelerator)
    losses = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
    return losses, json.loads((out / "evaluation.jsonl").read_text())


def test_two_processes_train_what_one_does(together, tmp_path):
    """Features in two shares, half a batch each: the same losses, weights and measures."""
    place, told = together
    forget_accelerate()
    losses, measured = cached_run(tmp_path, place / "inputs", 8)
    forget_accelerate()
    for found in told["probe"]:
        assert found[0] == pytest.approx(losses, rel=1e-4)
        assert found[1] == measured
    assert len(set(losses)) == 6
    ours, theirs = (Probe.from_pretrained(folder).head.state_dict() for folder in (tmp_path, place / "probe"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)


def test_recipes_and_bad_input(monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIGS.parents[1])
    kinds = (TrainingConfig, DataConfig, ProbeConfig)
    for name in ("linear", "convolution", "attention", "difformer", "diffeed"):
        _, _, probe = parse_recipe(kinds, ["--config", str(CONFIGS / f"probe_digits_{name}.yaml")])
        assert Path(probe.pretrained_model_name_or_path).is_dir()
        assert probe.steps_of().version == 1
    recipe = ["--config", str(CONFIGS / "probe_digits_attention.yaml"), "--output_dir", str(tmp_path)]
    for flags, message in [
        (["--label_column", "none"], "The data have no classes"),
        (["--pooling", "mean"], "leaves vectors, and 'attention' reads maps"),
        (["--feature_cache", str(tmp_path / "f")], "knows an image as it is; random_rotation"),
        (["--missing_labels", "keep"], "missing_labels: a probe learns from images"),
        (["--layers", "mid_blok"], "mid_block"),
        (["--preset", "difformer"], "this UNet2DModel has another architecture"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_probe.main([*recipe, *flags])
