"""Checkpoints of HybViT: the converted network gives what a plain network in their names gives."""

import pytest
import torch
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline

from diffusers_repr.cli import convert as command
from diffusers_repr.cli import read_settings
from diffusers_repr.models import JointViTModel
from diffusers_repr.models.convert_joint import convert_joint_vit, is_joint_vit
from tests.models.official_hybvit import OfficialHybViT, diffusion_state
from tests.models.official_sit import OfficialSiT

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(channels=3, side=8):
    x = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([28.0, 333.0, 650.0])


def assert_same_network(model, official, x, t):
    with torch.no_grad():
        noise, logits = official(x, t)
        got, clean = model(x, t), model(x)
        assert noise.std() > 0.1
        torch.testing.assert_close(got.sample, noise, **CLOSE)
        torch.testing.assert_close(got.logits, logits, **CLOSE)
        torch.testing.assert_close(clean.logits, official(x)[1], **CLOSE)


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 1, "patch": 4}, {"dim": 16, "heads": 8, "side": 12}, {"heads": 3}]
)
def test_the_network(changes):
    official = OfficialHybViT(**changes)
    overrides = {"num_attention_heads": 3} if changes == {"heads": 3} else {}
    converted = convert_joint_vit(official.state_dict(), overrides)
    model = JointViTModel(**converted.config).eval()
    model.load_state_dict(converted.transformer)
    assert (converted.architecture, model.config.form, model.config.modulate_mlp) == ("hybvit", "hybvit", True)
    assert_same_network(model, official, *inputs(changes.get("channels", 3), changes.get("side", 8)))
    assert any("heads" in note for note in converted.notes) == (not overrides)
    assert any("--ffnt" in note for note in converted.notes)


def test_the_command(tmp_path, capsys):
    """A whole checkpoint of their training, read by its shape; its pipeline classifies and samples."""
    official = OfficialHybViT()
    state = diffusion_state(official, timesteps=100)
    kept = {"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}},
            "scheduler": {"last_epoch": 4}}  # fmt: skip
    torch.save(kept, tmp_path / "ema_checkpoint.pth")
    words = [str(tmp_path / "ema_checkpoint.pth"), "--out", str(tmp_path / "out")]

    def run(*more):
        return command.run(read_settings("convert", [*words, *more]))

    for flags, message in (
        (("--architecture", "dit"), "no checkpoint of DiT, SiT or REPA"),
        (("--vae", "some/vae"), "network of pixels"),
        (("--sampler", "sde", "--path", "linear"), "drop --path, --sampler"),
        (("--model_config", '{"class_dropout_prob": 0.1}'), "JointViTModel takes dropout, form"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*flags)
    assert not (tmp_path / "out").exists()
    assert run("--model_config", '{"id2label": ["a", "b", "c", "d", "e"]}') == 0
    told = capsys.readouterr().out
    assert "weights 'model_state_dict'" in told
    assert "hybvit, 2 blocks of width 24 with 12 heads, patch 2, 5 classes" in told
    pipe = JointDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_same_network(pipe.unet, official, *inputs())
    assert pipe.labels == ["a", "b", "c", "d", "e"]
    torch.testing.assert_close(pipe.scheduler.betas, state["betas"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="pt").images.shape == (2, 3, 8, 8)


def test_what_is_refused():
    weights = OfficialHybViT().state_dict()
    assert is_joint_vit(weights)
    assert is_joint_vit({f"denoise_fn.module.{name}": value for name, value in weights.items()})
    assert not is_joint_vit(OfficialSiT().state_dict())
    with pytest.raises(ValueError, match="no checkpoint of HybViT: it lacks to_patch_embedding.1.weight, recon_head"):
        convert_joint_vit(OfficialSiT().state_dict())
    missing = {name: value for name, value in weights.items() if name != "recon_head.0.bias"}
    with pytest.raises(ValueError, match="2 blocks of width 24.: it lacks recon_head.0.bias. Its variants"):
        convert_joint_vit(missing)
    with pytest.raises(ValueError, match=r"it has transformer.layers.0.0.fn.scale, which are unknown.*--LSA"):
        convert_joint_vit({**weights, "transformer.layers.0.0.fn.scale": torch.ones(1)})
    narrow = {**weights, "transformer.layers.0.0.fn.to_qkv.weight": torch.ones(60, 24)}
    with pytest.raises(ValueError, match=r"to_qkv.weight is \(60, 24\); heads that make up the width have \(72, 24\)"):
        convert_joint_vit(narrow)
    with pytest.raises(ValueError, match="15 patches, no square; give the size of the image"):
        convert_joint_vit({**weights, "pos_embedding": torch.ones(1, 16, 24)})
    with pytest.raises(ValueError, match="Patches of 10 values are no squares"):
        convert_joint_vit({**weights, "to_patch_embedding.1.weight": torch.ones(24, 10)})
    other = {**diffusion_state(OfficialHybViT()), "betas": torch.linspace(1e-4, 0.02, 1000)}
    with pytest.raises(ValueError, match="1000 betas are not those of the cosine schedule"):
        convert_joint_vit(other)
