"""`train_autoencoder.py`: a run beside a frozen base, what it measures and saves, its recipes, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers_repr.pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from train_autoencoder import EvaluationConfig, main

from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.encoders import load_encoder
from diffusers_repr.objectives import DiffusionAutoencoderConfig
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = {
    "pretrained_model_name_or_path": str(EXAMPLES / "models" / "digits-ddpm"),
    "frozen_base": True,
    "encoder": {"code_dim": 4, "block_out_channels": [8], "norm_num_groups": 4, "attention_head_dim": 8},
    "dataset_name": "digits",
    "dataset_split": "validation",
    "eval_split": "test",
    "eval_images": 2,
    "train_batch_size": 2,
    "max_train_steps": 1,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "num_inference_steps": 2,
}


def flags(folder: Path, **changes) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (RECIPE | changes).items() if value is not None}))
    return ["--config", str(path), "--output_dir", str(folder / "out")]


def test_a_run_beside_a_frozen_base(tmp_path):
    run_script(main, "train_autoencoder", *flags(tmp_path))
    pipe = DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "out")
    picture = load_digits_splits()["test"][0]["image"]
    code = pipe.encode(picture, None).code
    torch.testing.assert_close(load_encoder(tmp_path / "out")(picture)["global"], code, rtol=1e-5, atol=1e-5)
    assert code.shape == (1, 4)
    (line,) = (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()
    numbers = json.loads(line)
    assert numbers["mse_inferred"] < numbers["mse_random"]
    assert numbers["denoising_base"] == pytest.approx(numbers["denoising_own"], rel=0.1)  # a step from it
    assert {f"{name}_5_shot" for name in ("code", "untrained", "pixels")} <= numbers.keys()
    assert numbers["pixels_5_shot"] > 0.6


@pytest.mark.parametrize(("changes", "message"), [
    ({"frozen_base": None, "pretrained_model_name_or_path": None}, "needs `sample_size`"),
    ({"pretrained_model_name_or_path": None}, "needs `sample_size`"),
    ({"encoder": {"variational": True}}, "leave them out"),
])  # fmt: skip
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_recipes_that_are_shipped():
    kinds, found = (TrainingConfig, DataConfig, DiffusionAutoencoderConfig, EvaluationConfig), {}
    for name in ("diffae", "infodiffusion", "pdae"):
        config, _, found[name], _ = parse_recipe(kinds, ["--config", str(EXAMPLES / f"configs/{name}_digits.yaml")])
        assert config.output_dir == f"outputs/digits-{name}"
    switches = {name: (one.frozen_base, one.modulation, one.penalty, one.weighting) for name, one in found.items()}
    assert switches == {
        "diffae": (False, "scale", "none", "uniform"),
        "infodiffusion": (False, "scale_shift", "mmd", "uniform"),
        "pdae": (True, "scale_shift", "none", "snr"),
    }
