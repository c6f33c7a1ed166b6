"""`train_autoencoder.py`: a run beside a frozen base, what it measures and saves, its recipes, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers_repr.pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from train_autoencoder import EvaluationConfig, main
from train_representation import ModelConfig
from train_representation import main as train_representation

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    run_script(main, "train_autoencoder", *flags(folder))
    return folder / "out"


def test_a_run_beside_a_frozen_base(trained):
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained)
    picture = load_digits_splits()["test"][0]["image"]
    code = pipe.encode(picture, None).code
    torch.testing.assert_close(load_encoder(trained)(picture)["global"], code, rtol=1e-5, atol=1e-5)
    assert code.shape == (1, 4)
    (line,) = (trained / "evaluation.jsonl").read_text().splitlines()
    numbers = json.loads(line)
    assert numbers["mse_inferred"] < numbers["mse_random"]
    assert numbers["denoising_base"] == pytest.approx(numbers["denoising_own"], rel=0.1)  # a step from it
    assert {f"{name}_5_shot" for name in ("code", "untrained", "pixels")} <= numbers.keys()
    assert numbers["pixels_5_shot"] > 0.6


def test_codes_are_drawn_by_a_prior_of_its_own_codes(trained, tmp_path):
    """As the page says: the recipe of codes, of a folder that training wrote, then samples, and one folder of all."""
    recipe = str(EXAMPLES / "configs" / "codes_digits.yaml")
    small = json.dumps({"hidden_size": 16, "num_layers": 1, "time_embed_dim": 8})
    changes = {"encoder": trained, "dataset_split": "validation", "eval_split": "none", "model": small,
               "train_batch_size": 8, "max_train_steps": 1, "output_dir": tmp_path / "codes"}  # fmt: skip
    given = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    run_script(train_representation, "train_representation", "--config", recipe, *given)
    pipe = DiffusionAutoencoderPipeline.from_pretrained(trained)
    with pytest.raises(ValueError, match=r"codes_digits\.yaml"):
        pipe(batch_size=2, num_inference_steps=1)
    pipe.load_prior(tmp_path / "codes")
    codes = pipe.encode(load_digits_splits()["validation"]["image"][:], None).code
    torch.testing.assert_close(torch.tensor(pipe.config.code_mean), codes.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(pipe.config.code_std), codes.std(0, correction=0), rtol=1e-3, atol=1e-4)
    pipe.save_pretrained(tmp_path / "whole")
    drawn = [
        one(
            batch_size=2,
            num_inference_steps=1,
            prior_num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        )
        for one in (pipe, DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "whole"))
    ]
    assert torch.equal(drawn[0].code, drawn[1].code)
    assert len(drawn[0].images) == 2


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
    kinds = (TrainingConfig, DataConfig, ModelConfig)
    _, _, codes = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs/codes_digits.yaml")])
    assert (codes.encoder, codes.over) == ("outputs/digits-diffae", "column")
    switches = {name: (one.frozen_base, one.modulation, one.penalty, one.weighting) for name, one in found.items()}
    assert switches == {
        "diffae": (False, "scale", "none", "uniform"),
        "infodiffusion": (False, "scale_shift", "mmd", "uniform"),
        "pdae": (True, "scale_shift", "none", "snr"),
    }
