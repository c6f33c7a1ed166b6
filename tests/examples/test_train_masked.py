"""l-DAE and MDM by their scripts, from the recipe to what is read."""

import json
from pathlib import Path

import pytest
import torch
import train_ldae
import train_mdm
import yaml
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig
from diffusers_repr.encoders import Encoder
from diffusers_repr.models import PatchPCA, SiTTransformer2DModel
from diffusers_repr.objectives import LDAEConfig, LDAEObjective, MDMConfig, MDMObjective
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script
from tests.training.loop_cases import forget_accelerate

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
COMMON = {
    "dataset_name": "digits",
    "random_rotation": 10.0,
    "train_batch_size": 8,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "ema_max_decay": 0.5,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "seed": 3,
}
LDAE = COMMON | {
    "model": {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_layers": 2, "hidden_size": 16,
              "num_attention_heads": 2},
    "num_directions": 5,
    "pca_images": 100,
}  # fmt: skip
MDM = COMMON | {
    "model": {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
              "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2,
              "up_block_types": ["UpBlock2D"] * 2},
    "mask_patch_size": 2,
    "eval_split": "test",
    "eval_batch_size": 8,
    "num_inference_steps": 2,
}  # fmt: skip


def write_recipe(folder: Path, recipe: dict, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return str(path)


def test_ldae(tmp_path):
    config = write_recipe(tmp_path, LDAE)
    run_script(train_ldae.main, "train_ldae", "--config", config, "--output_dir", str(tmp_path / "out"))
    encoder = Encoder.from_pretrained(tmp_path / "out")
    assert (encoder.channels, encoder.dim, encoder.num_blocks, encoder.grid_for((8, 8))) == (1, 16, 1, (2, 2))
    network = SiTTransformer2DModel.from_pretrained(tmp_path / "out" / "denoiser")
    pca = PatchPCA.from_pretrained(tmp_path / "out" / "pca")
    assert (len(network.blocks), pca.config["num_directions"]) == (2, 5)
    rows = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert all(row["loss"] == pytest.approx(row["signal"] + 0.1 * row["residual"], rel=1e-4) for row in rows)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = LDAEConfig(model=LDAE["model"], num_directions=5)
    told = LDAEObjective(network, pca, config).encode(images)
    read = Encoder.from_pretrained(tmp_path / "out", layer=-1).encode_pixels(images)["global"]
    torch.testing.assert_close(read, told, atol=1e-5, rtol=1e-4)
    assert "l-DAE" in (tmp_path / "out" / "README.md").read_text()


def test_mdm(tmp_path):
    config = write_recipe(tmp_path, MDM)
    run_script(train_mdm.main, "train_mdm", "--config", config, "--output_dir", str(tmp_path / "out"))
    denoiser = Denoiser.from_pretrained(tmp_path / "out")
    assert (denoiser.schedule.kind, denoiser.schedule.patch_size) == ("patch_mask", 2)
    (line,) = (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()
    errors = json.loads(line)
    assert set(errors) == {"step", "mse_masked", "mse_visible", "mse_masked_zero_fill", "ssim"}
    assert 0.5 < errors["mse_masked_zero_fill"] < 0.9
    with Image.open(tmp_path / "out" / "reconstructions.png") as picture:
        assert picture.width > 64
    row = json.loads((tmp_path / "out" / "loss.jsonl").read_text().splitlines()[-1])
    assert {"ssim", "mse_masked", "mse_visible"} <= set(row)


@pytest.mark.parametrize(
    ("main", "recipe", "changes", "message"),
    [
        (train_ldae.main, LDAE, {"num_directions": 17}, "have 16 directions"),
        (train_ldae.main, LDAE, {"pca_images": 1}, "4 patches tell at most 3 directions; 5 were asked for"),
        (train_ldae.main, LDAE, {"noise_rule": "cosine"}, "noise_rule"),
        (train_mdm.main, MDM, {"mask_patch_size": 3}, "do not divide images of 8 x 8, and images are not padded"),
        (train_mdm.main, MDM, {"reconstruction": "huber"}, "reconstruction"),
        (train_mdm.main, MDM, {"ssim_window": 17}, "does not fit images of 8 x 8"),
        (train_mdm.main, MDM, {"eval_split": "tset"}, "no split 'tset'"),
    ],
)
def test_bad_settings(tmp_path, main, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["--config", write_recipe(tmp_path, recipe, **changes), "--output_dir", str(tmp_path / "out")])
    forget_accelerate()


def test_recipes_parse():
    config, _, ldae = parse_recipe(
        (TrainingConfig, DataConfig, LDAEConfig), ["--config", str(CONFIGS / "ldae_digits.yaml")]
    )
    network = ldae.build()
    LDAEObjective(network, PatchPCA(network.config.patch_size, 1, ldae.num_directions), ldae)
    assert config.max_train_steps > 100
    kinds = (TrainingConfig, DataConfig, MDMConfig, MeasuredSplit)
    config, _, mdm, _ = parse_recipe(kinds, ["--config", str(CONFIGS / "mdm_digits.yaml")])
    MDMObjective(mdm.build(), mdm.reconstruction, mdm.ssim_window)
