"""The recipes of REPA's relatives, some steps of each."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from diffusers_repr.pipelines.sit import SiTPipeline
from train_repa import ModelConfig, main
from transformers import ViTConfig, ViTModel

from tests.examples.scripts import run_script
from tests.training.loop_cases import read_lines

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
TINY = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
# Recipe -> what it logs besides the denoising loss, heads that are saved, the saved components.
RELATIVES = {
    "irepa": ({"alignment"}, {"projector-teacher"}, {"transformer"}),
    "dispersive": ({"dispersive"}, set(), {"transformer"}),
    "haste": ({"alignment", "attention"}, {"projector-teacher"}, {"transformer"}),
    "sra": ({"self_alignment"}, {"projector-self-alignment"}, {"transformer"}),
    "reg": ({"alignment", "class_token"}, {"projector-teacher"}, {"transformer", "class_token"}),
    "repa_e": ({"main_alignment", "vae_reconstruction", "vae_kl"}, {"projector-teacher"}, {"transformer", "vae"}),
}


def save_teacher(folder):
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=2,
                       num_attention_heads=2, intermediate_size=32)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    grey = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.5], "image_std": [0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(grey))


def test_each_recipe(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_teacher(tmp_path / "teacher")
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a fifth of the time, for process groups that there are none of
    assert {path.stem.removesuffix("_digits") for path in CONFIGS.glob("*_digits.yaml")} > set(RELATIVES)
    for name, (logged, heads, components) in RELATIVES.items():
        recipe, out = CONFIGS / f"{name}_digits.yaml", tmp_path / name
        flags = ["--config", recipe, "--output_dir", out, "--train_batch_size", 4, "--max_train_steps", 2,
                 "--logging_steps", 1, "--eval_batch_size", 0, "--projector_dim", 8, "--cache_images", "false",
                 "--model", json.dumps(TINY | ({"patch_size": 1} if name == "repa_e" else {}))]  # fmt: skip
        if name == "repa_e":
            small = yaml.safe_load(recipe.read_text())["vae_model"] | {"block_out_channels": [8, 8]}
            flags += ["--vae_model", json.dumps(small)]
        if "outputs/digits-encoder" in recipe.read_text():
            flags += ["--encoder", tmp_path / "teacher"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            run_script(main, "train_repa", *map(str, flags))
        assert ["LPIPS" in str(one.message) for one in told] == ([True] if name == "repa_e" else [])
        line = read_lines(out)[-1]
        assert logged <= line.keys(), name
        assert line["skipped"] == 0
        assert {path.name for path in (out / "heads").glob("*")} == heads, name
        assert {path.name for path in out.iterdir() if (path / "config.json").is_file()} == components, name
    pipe = SiTPipeline.from_pretrained(tmp_path / "repa_e")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=2).images[0].size == (8, 8)
    assert pipe.vae.config.scaling_factor == 1.0


def test_settings_of_repa_e_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="which only `repa_e` trains"):
        main(["--vae_model", '{"in_channels": 1}', "--encoder", "none", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="give one of them"):
        ModelConfig(vae="folder", vae_model={"in_channels": 1})
