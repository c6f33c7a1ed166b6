"""The script of RCG's vectors: what it makes, trains, measures and refuses; both halves by the recipes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers_repr.pipelines.rcg import RCGPipeline
from train_conditional import ConditionConfig
from train_representation import ModelConfig, main

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.assign import IdentityAssigner, standardize_vectors
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = EXAMPLES / "models" / "digits-ddpm"
RECIPE = {
    "dataset_name": "digits",
    "dataset_split": "validation",
    "eval_split": "test",
    "encoder": f"{BASE}:mid_block@100",
    "class_conditional": True,
    "label_dropout": 0.5,
    "model": {"hidden_size": 16, "num_layers": 1, "time_embed_dim": 8, "class_embed_dim": 4},
    "train_batch_size": 8,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "num_inference_steps": 2,
    "seed": 3,
}


def flags(folder: Path, **changes) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (RECIPE | changes).items() if value is not None}))
    return ["--config", str(path), "--output_dir", str(folder / "out")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("representation")
    run_script(main, "train_representation", *flags(folder))
    return folder


def test_the_vectors_are_those_of_the_encoder_and_of_the_other_half(finished):
    encoder = Encoder.from_denoiser(Denoiser.from_pretrained(BASE), "mid_block", 100, noise_seed=3)
    raw = encoder([load_digits_splits()["validation"][row]["image"] for row in range(3)]).global_features
    assigner = IdentityAssigner.from_pretrained(finished / "out" / "assigner")
    assert assigner.config.over == "vector"
    wanted = standardize_vectors(raw)
    torch.testing.assert_close(assigner.assign(raw), wanted)
    config = DataConfig("digits", dataset_split="validation", assignments_dir=str(finished / "out-assigned"))
    images = load_train_data(config, 1, 8)
    found = torch.stack([images[row]["condition"] for row in range(3)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_folder_samples_vectors_by_class_and_is_measured(finished):
    pipe = RCGPipeline.from_pretrained(finished / "out")
    pipe.set_progress_bar_config(disable=True)
    vectors = pipe.sample_representations(class_labels=[3, 3], num_inference_steps=2, guidance_scale=2.0)
    assert vectors.shape == (2, 64)
    assert pipe.labels["7"] == 7
    (line,) = (finished / "out" / "evaluation.jsonl").read_text().splitlines()
    numbers = json.loads(line)
    assert 0 < numbers["frechet_train_vectors"] < numbers["frechet_vectors"]


def test_the_same_command_reads_what_is_there(finished):
    """Without an encoder, from the vectors of the first run; a run without classes."""
    changes = {"encoder": None, "eval_split": "none", "class_conditional": None, "max_train_steps": 1}
    told = flags(finished, **changes, assignments_dir=str(finished / "out-assigned"))
    told[-1] = str(finished / "plain")
    run_script(main, "train_representation", *told)
    assert RCGPipeline.from_pretrained(finished / "plain").prior.config.num_classes == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {"hidden": 3}}, "Unknown key 'hidden'"),
    ({"model": {"in_channels": 3}}, "takes in_channels from the encoder"),
    ({"label_dropout": 2.0}, "is a probability"),
    ({"encoder": None}, "name the `encoder`"),
    ({"encoder": None, "eval_split": None}, "name the `encoder`"),
    ({"label_column": "none", "eval_split": None}, "the data have no classes"),
])  # fmt: skip
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_recipes_that_are_shipped():
    kinds = (TrainingConfig, DataConfig, ModelConfig)
    config, data, vectors = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs/rcg_representation_digits.yaml")])
    assert vectors.over == "vector"
    kinds = (TrainingConfig, DataConfig, ConditionConfig)
    other, same, pixels = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs/rcg_pixels_digits.yaml")])
    assert data.assignments_dir == same.assignments_dir
    assert pixels.assigner is None
    assert pixels.network == "SiTTransformer2DModel"
    assert config.output_dir != other.output_dir
