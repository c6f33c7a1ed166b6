"""MoCo v3's checkpoints: the folder gives what a plain network in the authors' names gives."""

import json

import pytest
import torch
from transformers import ViTModel

from diffusers_repr.cli import main
from diffusers_repr.encoders import Encoder
from diffusers_repr.models.convert_moco import convert_moco_v3, moco_positions
from tests.models.official_moco import OfficialMoCo, position_table

TWO = ["--model_config", '{"num_attention_heads": 2}']


def own(official, **changes):
    """The state dict as `select_weights` gives it."""
    state = {k.removeprefix("module."): v for k, v in official.checkpoint()["state_dict"].items()}
    return {**state, **{f"base_encoder.{name}": value for name, value in changes.items()}}


def test_convert_moco_v3(tmp_path, capsys):
    official = OfficialMoCo()
    torch.save(official.checkpoint(), tmp_path / "vit-s.pth.tar")
    assert main(["convert", str(tmp_path / "vit-s.pth.tar"), "--out", str(tmp_path / "out"), *TWO]) == 0
    told = capsys.readouterr().out
    assert "2 blocks of width 16 with 2 heads, patch 2, made for 8 pixels" in told
    assert "Its projection head, momentum_encoder, predictor were left out." in told
    encoder = Encoder.from_pretrained(tmp_path / "out")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = official((images - mean) / std)
    found = encoder.encode_pixels(2 * images - 1)
    assert wanted.std() > 0.5
    torch.testing.assert_close(found.tokens, wanted[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.global_features, wanted[:, 0], atol=1e-4, rtol=1e-4)
    assert encoder.source.side == 8  # of its image processor
    assert Encoder.from_pretrained(tmp_path / "out", positions="repa").encode_pixels(images).grid == (4, 4)
    plain = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain((images - mean) / std).last_hidden_state, wanted, atol=1e-4, rtol=1e-4)
    words = ["convert", str(tmp_path / "vit-s.pth.tar"), "--out", str(tmp_path / "out"), *TWO]
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0  # its own folder, and known as such


def test_positions_are_the_authors_formula():
    for side, width in ((4, 16), (3, 8)):
        torch.testing.assert_close(moco_positions(side, width), position_table(side, width).float())
    official = OfficialMoCo()
    table = official.weights["pos_embed"]
    turned = table[:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    for wrong in (torch.cat([table[:, :1], turned], 1), table + 0.1, table.roll(4, -1)):
        with pytest.raises(ValueError, match="not the fixed sin-cos grid of MoCo v3"):
            convert_moco_v3(own(official, pos_embed=wrong), 2)
    with pytest.raises(ValueError, match="16 places, no square and one"):
        convert_moco_v3(own(official, pos_embed=table[:, 1:]), 2)


def test_names_that_stuck_together_are_mended():
    official = OfficialMoCo(depth=15, dim=8, hidden=8, side=4)
    weights, right = own(official), convert_moco_v3(own(official), 2).weights
    for name, stuck in (("13.norm1", "13.norm13"), ("13.mlp.fc1", "13.mlp.fc13"), ("14.norm2", "14.norm14"),
                        ("14.mlp.fc2", "14.mlp.fc14")):  # fmt: skip
        for end in ("weight", "bias"):
            weights[f"base_encoder.blocks.{stuck}.{end}"] = weights.pop(f"base_encoder.blocks.{name}.{end}")
    found = convert_moco_v3(weights, 2).weights
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_known_widths_have_the_authors_heads():
    """ViT-S has 12 heads here, where DeiT's has 6."""
    found = convert_moco_v3(own(OfficialMoCo(dim=384, depth=1, heads=12, hidden=8, side=4)))
    assert found.config["num_attention_heads"] == 12
    assert (found.config["layer_norm_eps"], found.config["intermediate_size"]) == (1e-6, 8)
    with pytest.raises(ValueError, match="num_attention_heads is 3, which does not divide the width, 16"):
        convert_moco_v3(own(OfficialMoCo()), 3)
    with pytest.raises(ValueError, match=r"width 16; give num_attention_heads. Known widths: 384 \(12\), 768"):
        convert_moco_v3(own(OfficialMoCo()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("base_encoder.blocks.1.mlp.fc2.bias"), "it lacks blocks.1.mlp.fc2.bias"),
        (lambda w: w.pop("base_encoder.cls_token"), "it lacks cls_token"),
        (lambda w: w.update({"base_encoder.blocks.0.ls1.gamma": torch.ones(16)}), "it has blocks.0.ls1.gamma, which"),
        (lambda w: w["base_encoder.norm.weight"].fill_(torch.nan), "norm.weight"),
        (lambda w: w.update({"base_encoder.patch_embed.proj.0.weight": w.pop("base_encoder.patch_embed.proj.weight")}),
         "has a convolutional stem; only its plain vision transformers"),
        (lambda w: w.pop("base_encoder.pos_embed"), "has no vision transformer"),
        (lambda w: w.update({"base_encoder.blocks.1.mlp.fc2.weight": torch.ones(16, 16)}),
         r"'blocks.1.mlp.fc2.weight' is \(16, 16\); its others ask for \(16, 64\)"),
        (lambda w: w.update({"base_encoder.blocks.0.attn.qkv.bias": torch.ones(16)}), r"ask for \(48,\)"),
        (lambda w: w.update({"base_encoder.patch_embed.proj.bias": torch.ones(8)}), r"ask for \(16,\)"),
        (lambda w: w.update({"base_encoder.cls_token": torch.ones(1, 2, 16)}), r"ask for \(1, 1, 16\)"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message):
    weights = own(OfficialMoCo())
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_moco_v3(weights, 2)


def test_settings_that_would_do_nothing(tmp_path, capsys):
    torch.save(OfficialMoCo().checkpoint(), tmp_path / "c.pth.tar")
    words = ["convert", str(tmp_path / "c.pth.tar"), "--out", str(tmp_path / "out")]
    assert main([*words, *TWO, "--architecture", "sit", "--path", "linear"]) == 2
    assert "MoCo v3 is an encoder, no pipeline; drop --architecture, --path" in capsys.readouterr().err
    assert main([*words, "--model_config", json.dumps({"qk_norm": True})]) == 2
    assert "has qk_norm; of a MoCo v3 it takes num_attention_heads alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
