"""The scripts of tokenizer, MAGE and ADDP, one after the other: what they write loads, generates and recognises."""

import json
from pathlib import Path

import pytest
import torch
import train_addp
import train_mage
import train_tokenizer
import yaml
from diffusers import VQModel
from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.cli import main as command
from diffusers_repr.encoders import load_encoder
from tests.examples.scripts import EXAMPLES, run_script
from tests.objectives.token_cases import SIZES, VQ, images, pixel_model, tokenizer

LOOP = {"dataset_name": "digits", "dataset_split": "validation", "label_column": "none", "cache_images": True,
        "train_batch_size": 8, "max_train_steps": 2, "checkpointing_steps": 2, "logging_steps": 1,
        "eval_batch_size": 8, "num_inference_steps": 3}  # fmt: skip
TOKENIZER = {"model": VQ, "eval_split": "test", "random_rotation": 5.0}


def flags(folder: Path, name: str, **settings) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**LOOP, "output_dir": str(folder / name), **settings}))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    run_script(train_tokenizer.main, "train_tokenizer", *flags(folder, "tokenizer", **TOKENIZER))
    first = {"tokenizer": str(folder / "tokenizer"), "model": SIZES, "cache_tokens": True}
    run_script(train_mage.main, "train_mage", *flags(folder, "mage", **first))
    second = {"predictor": str(folder / "mage"), "model": SIZES, "random_shift": 0.05}
    run_script(train_addp.main, "train_addp", *flags(folder, "addp", **second))
    return folder


def test_what_each_writes(made):
    vqvae = VQModel.from_pretrained(made / "tokenizer")
    held = json.loads((made / "tokenizer" / "evaluation.jsonl").read_text().splitlines()[-1])
    assert held["mse"] > 0
    assert 1 <= held["codes_used"] <= 7
    for name in ("mage", "addp"):
        pipe = TokenGenerationPipeline.from_pretrained(made / name)
        for key, value in vqvae.state_dict().items():
            assert torch.equal(pipe.vqvae.state_dict()[key], value)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(batch_size=2, num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)
        assert load_encoder(made / name).encode_pixels(images())["global"].shape == (4, 16)
        lines = [json.loads(line) for line in (made / name / "loss.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert 0.5 <= lines[0]["mask_ratio"] <= 1
        assert (made / name / "samples.png").is_file()
    card = (made / "addp" / "README.md").read_text()
    assert "image-feature-extraction" in card


def test_mage_on_vectors(made, tmp_path):
    base = EXAMPLES / "models" / "digits-ddpm"
    assigned = ["assign", f"{base}:mid_block@100", "digits", "--split", "validation", "--method", "identity"]
    assert command([*assigned, "--out", str(tmp_path / "assigned")]) == 0
    given = {"tokenizer": str(made / "tokenizer"), "model": {"sample_size": 4, **SIZES}}
    told = flags(tmp_path, "mage", **given, assignments_dir=str(tmp_path / "assigned"))
    run_script(train_mage.main, "train_mage", *told)
    pipe = TokenGenerationPipeline.from_pretrained(tmp_path / "mage")
    width = IdentityAssigner.from_pretrained(tmp_path / "assigned" / "assigner").null.shape[0]
    assert pipe.transformer.config.condition_dim == width
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=2, guidance_scale=2.0, num_inference_steps=2)
    assert out.condition.shape == (2, width)
    assert (out.condition[:, None] == pipe.stored_prior.values).all(-1).any(1).all()  # of the training images


def test_what_does_not_fit(made, tmp_path):
    given = {"tokenizer": str(made / "tokenizer"), "model": {"sample_size": 3, **SIZES}}
    with pytest.raises(
        ValueError, match="An image is 4 x 4 tokens of this tokenizer, and the network is made for 3 x 3"
    ):
        run_script(train_mage.main, "train_mage", *flags(tmp_path, "mage", **given))
    given["tokenizer"] = "./nothing-here"
    with pytest.raises(FileNotFoundError, match=r"--tokenizer: there is no './nothing-here' here"):
        run_script(train_mage.main, "train_mage", *flags(tmp_path, "mage", **given))
    TokenGenerationPipeline(tokenizer(), pixel_model()).save_pretrained(tmp_path / "student")
    with pytest.raises(TypeError, match="as MAGE trains it; got PixelTokenModel"):
        run_script(
            train_addp.main,
            "train_addp",
            *flags(tmp_path, "addp", predictor=str(tmp_path / "student"), model=SIZES),
        )


@pytest.mark.parametrize(
    ("script", "name"), [(train_tokenizer, "tokenizer"), (train_mage, "mage"), (train_addp, "addp")]
)
def test_the_recipes(script, name, tmp_path, made):
    needs = {"mage": ["--tokenizer", str(made / "tokenizer")], "addp": ["--predictor", str(made / "mage")]}
    told = ["--config", str(EXAMPLES / "configs" / f"{name}_digits.yaml"), *needs.get(name, [])]
    printed = run_script(script.main, script.__name__, *told, "--dry_run", "--output_dir", str(tmp_path / "out"))
    assert "max_train_steps" in printed
