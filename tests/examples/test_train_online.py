"""train_online.py: from a recipe to a pipeline, an assigner and a prior; going on over the switch; bad recipes."""

import json
import shutil

import pytest
import torch
import train_online
import yaml
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from safetensors.torch import load_file
from train_online import OnlineConfig

from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import EXAMPLES, run_script

UVIT = {"sample_size": 8, "in_channels": 1, "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
UNET = {
    "sample_size": 8, "in_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
RECIPE = {
    "dataset_name": "digits", "model": UVIT | {"class_token": True}, "num_prototypes": 4, "embed_dim": 6,
    "train_batch_size": 8, "max_train_steps": 4, "checkpointing_steps": 3, "logging_steps": 1, "eval_batch_size": 8,
    "num_inference_steps": 1, "mixed_precision": "no", "learning_rate": 1e-3,
}  # fmt: skip


def run(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    run_script(train_online.main, "train_online", "--config", str(path), "--output_dir", str(tmp_path / "out"))
    return tmp_path / "out"


def test_goes_on_over_the_switch_bit_for_bit(tmp_path):
    output = run(tmp_path)
    lines = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    assert all(line["clustering"] >= 0 for line in lines)
    last = output / "checkpoint-00000004"
    wanted = {name: load_file(last / f"{name}.safetensors") for name in ("model", "ema")}
    shutil.rmtree(last)  # as after a kill in the second stage
    run(tmp_path)
    for name, tensors in wanted.items():
        again = load_file(last / f"{name}.safetensors")
        assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    pipe = SiTPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(batch_size=2, guidance_scale=1.4, num_inference_steps=1).images) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "SiTTransformer2DModel", "model": UVIT, "condition": "id"},
        {"network": "UNet2DModel", "model": UNET, "condition": "id", "scheduler": {"num_train_timesteps": 20}},
        {"condition": "patch", "head_norm": "layer"},
    ],
)
def test_other_networks_and_conditions(tmp_path, changes):
    output = run(tmp_path, **changes)
    kind = GuidedUnconditionalPipeline if "scheduler" in changes else SiTPipeline
    pipe = kind.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=1, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert (output / "samples.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "DiT"}, "`network` is one of UViTTransformer2DModel"),
        ({"model": UVIT | {"num_classes": 3}}, "decide on `num_classes`"),
        ({"model": {}}, "needs `sample_size`"),
        ({"switch": 1.0}, "`switch` is a share"),
        ({"network": "UNet2DModel", "model": UNET}, "is told the id"),
        ({"layer": "blocks.9"}, "`layer` 'blocks.9' is none of an image"),
    ],
)
def test_bad_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_recipe_that_is_shipped():
    kinds = (TrainingConfig, DataConfig, OnlineConfig)
    config, _, online = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs" / "online_digits.yaml")])
    objective = train_online.build(online, config.max_train_steps)
    assert objective.switch_step == config.max_train_steps // 2
    assert objective.clustering.layers == ("blocks.3",)
