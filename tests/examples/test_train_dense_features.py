"""`train_hyperfeatures.py` and `train_cleandift.py`: a run, what it measures and saves, and their recipes."""

import json
from pathlib import Path

import pytest
import torch
import train_cleandift
import train_hyperfeatures
from diffusers import DDPMPipeline
from PIL import Image
from torch.nn import functional

from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.data.pairs import PairConfig, load_pairs
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import cleandift_extractor
from diffusers_repr.heads import Hyperfeatures, HyperfeaturesHead
from diffusers_repr.metrics.pck import correct_points
from diffusers_repr.objectives import (
    CleanDIFTConfig,
    CleanDIFTObjective,
    HyperfeaturesConfig,
    HyperfeaturesObjective,
)
from diffusers_repr.tasks import PairAccuracy
from diffusers_repr.training import TrainingConfig
from tests.training.loop_cases import forget_accelerate

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = str(EXAMPLES / "models" / "digits-ddpm")


def run(main, **flags) -> None:
    arguments: list[str] = []
    for name, value in flags.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    try:
        main(arguments)
    finally:
        forget_accelerate()


def test_hyperfeatures(tmp_path):
    """It learns, measures what the saved head gives, and draws the weights."""
    run(
        train_hyperfeatures.main, pretrained_model_name_or_path=DIGITS, dataset_name="digits", steps=4, reads=[0, 2],
        max_train_steps=20, train_batch_size=4, learning_rate=0.01, ema_max_decay=0.8, logging_steps=5,
        max_points=12, eval_split="test", eval_pairs=6, output_dir=tmp_path / "out", cache_images=True,
        head=json.dumps({"width": 16, "bottleneck": 8}),
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    measured = json.loads((tmp_path / "out" / "evaluation.jsonl").read_text())
    assert set(measured) == {"step", "pck", "untrained_pck", "pixels_pck", "layer_pck"}
    head = HyperfeaturesHead.from_pretrained(tmp_path / "out")
    assert head.reads == [0, 2]
    assert not torch.equal(head.weights, torch.ones(2, 4))
    with Image.open(tmp_path / "out" / "mixing_weights.png") as picture:
        assert picture.size[0] > 200
    assert "![The share of each layer at each level](mixing_weights.png)" in (tmp_path / "out/README.md").read_text()

    config = HyperfeaturesConfig(DIGITS, steps=4, reads=[0, 2], head={"width": 16, "bottleneck": 8})
    objective = HyperfeaturesObjective(config.load_base(), (8, 8), config)
    pairs = load_pairs(PairConfig(dataset_split="test", max_points=12, cache_images=True), 1, (8, 8))
    accuracy, hits = PairAccuracy(objective, pairs, 6, 0), []
    source = Hyperfeatures(objective.denoiser, head)
    for batch in accuracy.batches():
        moved = pairs.on_device(batch)
        first, second = (
            functional.interpolate(source.from_pixels(part)["hyperfeatures"], (8, 8), mode="bilinear")
            for part in moved["images"]
        )
        for a, b, here, there, valid in zip(first, second, *moved["points"], moved["valid"], strict=True):
            place = (2 * here[valid] + 1) / 8 - 1
            vectors = functional.grid_sample(a[None], place[None, :, None], padding_mode="border", align_corners=False)
            best = (
                functional.normalize(vectors[0, :, :, 0], dim=0).T @ functional.normalize(b.flatten(1), dim=0)
            ).argmax(1)
            found = torch.stack([best % 8, best // 8], 1).float()
            hits.append(correct_points(found, there[valid], 8))
    assert measured["pck"] == pytest.approx(float(torch.cat(hits).float().mean()), abs=0.02)


def test_cleandift(tmp_path):
    """The result is a pipeline of diffusers, read without a level; what lies behind the last layer is the base's."""
    out = tmp_path / "out"
    run(
        train_cleandift.main, pretrained_model_name_or_path=DIGITS, dataset_name="digits", levels=2, time_width=16,
        max_train_steps=8, train_batch_size=4, learning_rate=0.001, ema_max_decay=0.5, logging_steps=2,
        eval_split="test", eval_images=3, output_dir=out,
    )  # fmt: skip
    log = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    measured = json.loads((out / "evaluation.jsonl").read_text())
    assert set(measured) == {"step", "clean_cosine", "adapted_cosine", "noisy_cosine", "base_cosine"}
    assert measured["clean_cosine"] > measured["base_cosine"]
    pipe, base = DDPMPipeline.from_pretrained(out), DDPMPipeline.from_pretrained(DIGITS)
    ours, theirs = pipe.unet.float().state_dict(), base.unet.float().state_dict()
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert "conv_out.weight" in same
    assert "conv_in.weight" not in same
    images = [Image.new("L", (8, 8), 90)]
    extractor = cleandift_extractor(out)
    assert (
        set(extractor(images).layers)
        == set(extractor.layers)
        == set(json.loads((out / "cleandift.json").read_text())["layers"])
    )
    assert torch.equal(extractor(images, ids=["a"])["mid_block"], extractor(images, ids=["b"])["mid_block"])
    assert 'cleandift_extractor("out")' in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="No base; pass"):
        train_cleandift.main(["--dataset_name", "digits"])


def test_recipes(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    for name in ("hyperfeatures_digits", "hyperfeatures_cars"):
        kinds = (TrainingConfig, PairConfig, HyperfeaturesConfig)
        _, pairs, config = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
        assert pairs.second_column is None
        assert HyperfeaturesHead.for_base(config.load_base(), steps=config.steps, reads=config.reads).reads[0] == 0
    for name in ("cleandift_digits", "cleandift_cars"):
        kinds = (TrainingConfig, DataConfig, CleanDIFTConfig, train_cleandift.EvaluationConfig)
        _, _, config, _ = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
        base = Denoiser.from_pretrained(config.pretrained_model_name_or_path)
        assert len(CleanDIFTObjective(base, config).layers) >= 4
