"""`train_joint.py`: both methods from a recipe to a folder that classifies and samples; the study's measures."""

import json
from argparse import Namespace

import joint_digits
import pytest
import torch
import train_joint
import yaml
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from digits_metrics import DigitsClassifier, DigitsJudge
from safetensors.torch import load_file

from diffusers_repr.objectives.joint import JointConfig

TINY = {
    "jdm": {
        "model": {
            "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
        "head": {"norm": "batch"},
    },
    "hybvit": {"model": {"patch_size": 4, "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}},
}  # fmt: skip
CHANGES = {"jdm": {"classify": "both"}, "hybvit": {"mixup": 0.5, "view_rotation": 5.0}}


def recipe(tmp_path, method, **changes):
    settings = {
        "output_dir": str(tmp_path / method), "method": method, "dataset_name": "digits",
        "image_channels": 1, "resolution": 8, "train_batch_size": 8, "max_train_steps": 3, "checkpointing_steps": 2,
        "logging_steps": 1, "eval_batch_size": 8, "num_inference_steps": 2, "mixed_precision": "no",
        **TINY[method], **changes,
    }  # fmt: skip
    path = tmp_path / f"{method}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.mark.parametrize("method", ["jdm", "hybvit"])
def test_from_a_recipe_to_a_pipeline(method, tmp_path):
    flags = recipe(tmp_path, method, **CHANGES[method])
    train_joint.main(flags)
    folder = tmp_path / method
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    weights = {"jdm": (1.0, 0.001), "hybvit": (100.0, 1.0)}[method]
    for line in lines:
        ce = line["ce"] + line.get("ce_noised", 0.0)
        error = line["eps_mse" if method == "jdm" else "eps_l1"]
        assert line["loss"] == pytest.approx(weights[0] * error + weights[1] * ce, rel=1e-4)
        assert line["labelled"] == 1
    assert ("ce_noised" in lines[0]) == (method == "jdm")
    pipe = JointDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == [str(digit) for digit in range(10)]
    found = pipe.classify(torch.rand(2, 1, 8, 8))
    assert found.probabilities.shape == (2, 10)
    images = pipe(class_labels=["3", "7"], guidance_scale=5.0, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8)] * 2
    assert (folder / "samples.png").is_file()
    assert ("JDMObjective" if method == "jdm" else "HybViTObjective") in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", [pytest.param("jdm", marks=pytest.mark.slow), "hybvit"])
def test_broken_off_and_taken_up_again_it_is_the_same_run(method, tmp_path):
    flags = recipe(tmp_path, method, **CHANGES[method], eval_batch_size=0, lr_scheduler="constant")
    folder, part = tmp_path / method, tmp_path / "part"
    train_joint.main(flags)
    train_joint.main([*flags, "--output_dir", str(part), "--max_train_steps", "2"])
    train_joint.main([*flags, "--output_dir", str(part)])
    for file in ("unet/diffusion_pytorch_model.safetensors", "classifier/diffusion_pytorch_model.safetensors"):
        if (folder / file).is_file():
            whole, resumed = load_file(folder / file), load_file(part / file)
            assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_the_recipes_are_whole(capsys):
    for name in ("jdm_digits", "hybvit_digits"):
        train_joint.main(["--config", str(joint_digits.CONFIGS / f"{name}.yaml"), "--dry_run"])
        printed = capsys.readouterr().out
        assert "# network: " in printed
        assert "trained: 0" not in printed


def test_what_is_refused(tmp_path):
    for changes, message in (
        ({"model": {"wide": 3}}, "Unknown key 'wide' in `model`"),
        ({"head": {"depth": 3}}, "Unknown key 'depth' in `head`"),
        ({"head": {"num_classes": 3}}, "The data decide on num_classes"),
        ({"label_column": "none"}, "have no classes"),
        ({"classify": "noised", "view_flip": True}, "would not act on it"),
    ):
        with pytest.raises(ValueError, match=message):
            train_joint.main(recipe(tmp_path, "jdm", **changes))
    with pytest.raises(ValueError, match="`head` is of jdm"):
        train_joint.main(recipe(tmp_path, "hybvit", head={"dropout": 0.1}))


def test_the_studys_measures(tmp_path):
    torch.manual_seed(0)
    settings = JointConfig(method="hybvit", model=TINY["hybvit"]["model"], image_channels=1)
    pipe = train_joint.build_pipeline(settings, 8, [str(digit) for digit in range(10)])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.unet.proj_out.weight.zero_()
        pipe.unet.proj_out.bias.zero_()
    images = torch.rand(50, 1, 8, 8)
    assert joint_digits.denoising_error(pipe, images) == pytest.approx(1.0, abs=0.03)  # of 0, eps has variance 1
    judge = DigitsJudge(DigitsClassifier())
    args = Namespace(max_train_steps=1, num_samples=70, num_guided=70, num_inference_steps=1)
    rows = joint_digits.measure(pipe, judge, "HybViT", args)
    assert [row.get("scale") for row in rows] == [None, *joint_digits.RUNS["HybViT"][2]]
    turned = joint_digits.measure_turned(pipe, judge, "HybViT", 2)
    assert 0 <= turned["asked"] + turned["as_before"] <= 1
    assert set(rows[0]) == {"run", "steps", "parameters", "accuracy", "eps_mse", "frechet_distance"}
    assert "accuracy" not in joint_digits.measure(pipe, judge, "ViT, denoising alone", args)[0]
    assert "eps_mse" not in joint_digits.measure(pipe, judge, "ViT, classification alone", args)[0]
    runs, guided, edits = joint_digits.tables([*rows, turned])
    assert len(edits.splitlines()) == 3
    assert len(runs.splitlines()) == 3
    assert len(guided.splitlines()) == 2 + len(rows) - 1
    joint_digits.pictures(tmp_path, {"HybViT": pipe}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"hybvit_{kind}.png" for kind in ("counterfactual", "samples")
    ]
