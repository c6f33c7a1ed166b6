"""From scenes to a text-to-image model by four commands, at toy size: each result loads by the stock classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_clip
import train_text_to_image
import train_vae
import yaml
from datasets import load_dataset
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from make_scenes import main as make_scenes
from transformers import CLIPModel, CLIPTokenizer

from diffusers_repr import Denoiser, Encoder, FeatureExtractor
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.data.scenes import scenes
from diffusers_repr.objectives import AutoencoderConfig, ContrastiveConfig
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import EXAMPLES, run_script

RUN = {"train_batch_size": 4, "max_train_steps": 2, "checkpointing_steps": 2, "logging_steps": 1, "seed": 1,
       "mixed_precision": "no", "save_dtype": "float16", "label_column": "none", "image_column": "image",
       "cache_images": True, "eval_batch_size": 0}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BLOCKS = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
RECIPES = {
    "vae": {"model": {**BLOCKS, "sample_size": 32, "latent_channels": 4,
                      "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}},
    "clip": {"caption_column": "caption", "text": {**TOWER, "max_position_embeddings": 12}, "embedding_dim": 8,
             "vision": {**TOWER, "image_size": 32, "patch_size": 16}, "eval_splits": ["test", "held_out"]},
    "text": {"caption_column": "caption", "eval_batch_size": 16, "num_inference_steps": 2, "eval_prompts": ["a ring"],
             "model": {**BLOCKS, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": 2,
                       "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}},
}  # fmt: skip
MAINS = {"vae": train_vae, "clip": train_clip, "text": train_text_to_image}


def flags(folder: Path, name: str, **changes) -> list[str]:
    places = {"dataset_name": str(folder / "scenes")}
    if name == "text":
        places |= {"vae": str(folder / "vae"), "clip": str(folder / "clip")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(RUN | RECIPES[name] | places | changes))
    return ["--config", str(path), "--output_dir", str(folder / name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    counts = {"train": 12, "validation": 0, "test": 4, "held_out": 4}
    make_scenes(["--out", str(folder / "scenes"), *(f"--{name}={count}" for name, count in counts.items())])
    for name, script in MAINS.items():
        run_script(script.main, f"train_{name}", *flags(folder, name))
    return folder


def test_scenes_of_all_splits(folder):
    rows = load_dataset(str(folder / "scenes"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 12, "test": 4, "held_out": 4}


def test_the_stock_classes_load_it(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "text")
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    how = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 3.0}
    two, ring = (pipe(text, generator=torch.Generator().manual_seed(0), **how).images for text in ("a two", "a ring"))
    assert two.shape == (1, 32, 32, 3)
    assert np.isfinite(two).all()
    assert not np.allclose(two, ring)
    names = ("unet", "vae", "text_encoder", "clip")
    stored = sum(path.stat().st_size for name in names for path in (folder / "text" / name).glob("*.safetensors"))
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, CLIPModel.from_pretrained(folder / "text" / "clip"))
    numbers = sum(p.numel() for part in parts for p in part.parameters())
    assert stored < 2 * numbers + 50_000  # two bytes each, and the headers


def test_the_library_reads_and_guides_it(folder):
    denoiser = Denoiser.from_pretrained(folder / "text")
    assert (denoiser.image_size, denoiser.stride) == ((32, 32), 2)
    extractor = FeatureExtractor(denoiser, ["up_blocks.0"], timestep=100)
    image = next(scenes("test", 1)).image
    two, ring = (extractor([image], prompt=text)["up_blocks.0"] for text in ("a two", "a ring"))
    assert two.shape == (1, 8, 16, 16)
    assert not torch.equal(two, ring)
    towers = Encoder.from_pretrained(folder / "text" / "clip")
    assert (towers.dim, towers.grid_for((32, 32))) == (16, (2, 2))
    left_out = folder / "text" / "artifacts.json"  # what is uploaded beside the pipeline
    assert "clip/model.safetensors" in json.loads(left_out.read_text())


def test_it_stands_on_the_vae_and_the_clip(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "text")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    clip = CLIPModel.from_pretrained(folder / "text" / "clip", dtype=torch.float32)
    first = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32)
    tower = dict(clip.text_model.named_parameters())
    held = pipe.text_encoder.named_parameters()  # in transformers 4 under `text_model`
    assert all(torch.equal(p, tower[name.removeprefix("text_model.")]) for name, p in held)
    assert all(torch.equal(p, q) for p, q in zip(clip.parameters(), first.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(pipe.vae.parameters(), vae.parameters(), strict=True))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "text" / "clip")
    assert tokenizer.tokenize("a ring") == pipe.tokenizer.tokenize("a ring")
    numbers = yaml.safe_load((folder / "clip" / "evaluation.jsonl").read_text())
    assert 0 <= numbers["held_out_image_to_text"] <= 1
    assert numbers["held_out_chance"] >= 0.25


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("text", {"caption_column": None}, "name their column by --caption_column"),
        ("clip", {"caption_column": None}, "name their column by --caption_column"),
        ("text", {"model": {"in_channels": 3}}, "takes in_channels from the VAE"),
        ("text", {"label_dropout": 1.5}, "is a probability"),
    ],
)
def test_bad_settings(folder, tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        MAINS[name].main([*flags(folder, name, **changes)[:2], "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vae", AutoencoderConfig), ("clip", ContrastiveConfig), ("text_to_image", train_text_to_image.ModelConfig)],
)
def test_recipes_parse(name, kind):
    path = EXAMPLES / "configs" / f"{name}_scenes.yaml"
    config, data, _ = parse_recipe((TrainingConfig, DataConfig, kind), ["--config", str(path)])
    assert config.max_train_steps > 100
    assert data.dataset_name == "data/scenes"
