"""Checkpoints by the names of iREPA's, SRA's and REPA-E's code: the converted parts give what plain ones give."""

import json

import pytest
import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from torch.nn import functional

from diffusers_repr.cli import convert as command
from diffusers_repr.cli import read_settings
from diffusers_repr.heads.projector import Projector
from diffusers_repr.models.convert import convert_state_dict
from diffusers_repr.models.convert_autoencoder import convert_autoencoder
from tests.models.official_autoencoder import Official, drawn_weights
from tests.models.official_sit import OfficialSiT

TWO = {"num_attention_heads": 2}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([50.0, 333.0, 999.0]), torch.tensor([0, 7, 10])


def drawn(**shapes):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def convert(folder, checkpoint, *flags):
    torch.save(checkpoint, folder / "c.pt")
    words = [str(folder / "c.pt"), "--out", str(folder / "out"), "--model_config", json.dumps(TWO), *map(str, flags)]
    assert command.run(read_settings("convert", words)) == 0
    return SiTPipeline.from_pretrained(folder / "out")


def same_network(pipe, official, scale=1000):
    x, t, y = inputs()
    with torch.no_grad():
        found, wanted = pipe.transformer(x, t, y).sample, official(x, t / scale, y)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def head(folder, name):
    return Projector.from_pretrained(folder / "out" / "heads" / name)


def test_sra(tmp_path, capsys):
    official = OfficialSiT()
    own = drawn(a=(32, 16), b=(32,), c=(16, 32), d=(16,))
    names = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
    weights = official.state_dict() | {f"ap_head.{name}": own[key] for name, key in zip(names, "abcd", strict=True)}
    same_network(convert(tmp_path, {"ema": weights}), official)
    assert "projector of SRA" in (told := capsys.readouterr().out)
    assert "Taken for" not in told
    tokens = torch.randn(2, 16, 16)
    wanted = functional.linear(functional.silu(functional.linear(tokens, own["a"], own["b"])), own["c"], own["d"])
    torch.testing.assert_close(head(tmp_path, "projector-self-alignment")(tokens, (4, 4)), wanted)
    assert convert_state_dict(weights, overrides=TWO).architecture == "sit"
    dit = OfficialSiT(learn_sigma=True).state_dict()
    assert convert_state_dict({**dit, **weights, **{k: v for k, v in dit.items() if "final" in k}}, None, TWO
                              ).architecture == "dit"  # fmt: skip
    del weights["ap_head.linear2.bias"]
    with pytest.raises(ValueError, match="ap_head has"):
        convert_state_dict(weights, overrides=TWO)


def test_irepa(tmp_path):
    official = OfficialSiT()
    own = drawn(kernel=(6, 16, 3, 3), shift=(6,), matrix=(5, 16), other=(5,))
    mlp = OfficialSiT(z_dims=(7,)).projectors[0]
    names = "projectors.{}.projection_layer.{}"
    weights = official.state_dict()
    weights |= {names.format(0, "weight"): own["kernel"], names.format(0, "bias"): own["shift"]}
    weights |= {names.format(1, "weight"): own["matrix"], names.format(1, "bias"): own["other"]}
    weights |= {names.format(2, name): value for name, value in mlp.state_dict().items()}
    same_network(convert(tmp_path, {"ema": weights}), official)
    tokens = torch.randn(2, 16, 16)
    maps = tokens.mT.reshape(2, 16, 4, 4)
    wanted = functional.conv2d(maps, own["kernel"], own["shift"], padding=1).flatten(2).mT
    torch.testing.assert_close(head(tmp_path, "projector-0")(tokens, (4, 4)), wanted, rtol=1e-5, atol=1e-5)
    wanted = functional.linear(tokens, own["matrix"], own["other"])
    torch.testing.assert_close(head(tmp_path, "projector-1")(tokens, (4, 4)), wanted)
    torch.testing.assert_close(head(tmp_path, "projector-2")(tokens, (4, 4)), mlp(tokens))
    for end, shape in (("weight", (0, 16)), ("bias", (0,))):  # of its baseline, `z_dims=[0]`
        weights[names.format(3, end)] = torch.zeros(shape)
    assert len(convert_state_dict(weights, overrides=TWO).relatives.projectors) == 3
    del weights[names.format(0, "bias")]
    with pytest.raises(ValueError, match=r"projectors\.0 has weight; a projector of iREPA"):
        convert_state_dict(weights, overrides=TWO)


def test_repa_e(tmp_path, capsys):
    """The network sees (z - mean) / std of raw latents; samples are decoded as in its generate.py."""
    official, vae = OfficialSiT(z_dims=(6,)), drawn_weights()
    mean, var = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([4.0, 0.5, 1.0, 9.0])
    stats = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(7)}
    checkpoint = {"ema": official.state_dict() | stats, "vae": vae, "steps": 7}
    pipe = convert(tmp_path, checkpoint)
    assert "written into the weights of the VAE" in capsys.readouterr().out
    same_network(pipe, official)
    latents, plain = torch.randn(2, 4, 4, 4), Official(vae)
    column = (1, 4, 1, 1)
    with torch.no_grad():
        wanted = plain.decode(latents * var.sqrt().view(column) + mean.view(column))
        torch.testing.assert_close(pipe.vae.decode(latents).sample, wanted, rtol=1e-4, atol=1e-4)
        images = torch.randn(2, 3, 8, 8)
        found = pipe.vae.encode(images).latent_dist.mean
        normalized = (plain.encode(images) - mean.view(column)) / var.sqrt().view(column)
        torch.testing.assert_close(found, normalized, rtol=1e-4, atol=1e-4)
    assert pipe.vae.config.scaling_factor == 1.0
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="brings the VAE that was trained with it; drop --vae"):
        convert(tmp_path, checkpoint, "--vae", "elsewhere", "--overwrite")
    convert(tmp_path, {"ema": checkpoint["ema"]}, "--overwrite")
    assert "no VAE was put beside" in capsys.readouterr().out
    pipe.vae.save_pretrained(tmp_path / "vae")  # of another run, whose VAE was fixed: its file has none
    again = convert(tmp_path, {"ema": checkpoint["ema"]}, "--overwrite", "--vae", tmp_path / "vae")
    with torch.no_grad():
        wanted = pipe.vae.decode(latents * var.sqrt().view(column) + mean.view(column)).sample
        torch.testing.assert_close(again.vae.decode(latents).sample, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one number a channel"):
        convert_state_dict(checkpoint["ema"] | {"bn.running_var": -var}, overrides=TWO)


def test_an_autoencoder_without_attention_in_its_levels():
    weights = drawn_weights(attention=False)
    vae, plain, latents = convert_autoencoder(weights), Official(weights), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents).sample, plain.decode(latents), rtol=1e-4, atol=1e-4)
    broken = {key: value for key, value in weights.items() if key != "encoder.mid.block_1.conv1.weight"}
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1\.weight .* missing, unknown"):
        convert_autoencoder(broken)
    with pytest.raises(ValueError, match="no autoencoder of latent diffusion: it lacks"):
        convert_autoencoder({"x": torch.ones(1)})
