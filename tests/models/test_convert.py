"""Official checkpoints: the converted network gives what a plain network in their names gives."""

import argparse
import json

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.sit import SiTPipeline
from safetensors.torch import save_file

from diffusers_repr import Denoiser
from diffusers_repr.cli import convert as command
from diffusers_repr.cli import main, read_settings
from diffusers_repr.encoders import Encoder
from diffusers_repr.heads.projector import Projector
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.models.checkpoint import read_checkpoint, select_weights
from diffusers_repr.models.convert import ATTENTION_HEADS, convert_state_dict
from diffusers_repr.models.sit import SIZES
from diffusers_repr.objectives import REPAObjective, load_heads
from tests.models.official_sit import OfficialSiT

TWO = {"num_attention_heads": 2}


def inputs(channels=4, side=8):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, channels, side, side, generator=generator),
        torch.tensor([50.0, 333.0, 999.0]),
        torch.tensor([0, 7, 10]),
    )


def network(converted):
    model = SiTTransformer2DModel(**converted.config).eval()
    model.load_state_dict(converted.transformer)
    return model


def outputs(model, *args):
    with torch.no_grad():
        out = model(*args)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("changes", [{}, {"patch": 4}, {"channels": 3, "side": 12}, {"z_dims": (6, 9)}])
def test_repa_and_sit(changes):
    official = OfficialSiT(**changes)
    x, t, y = inputs(changes.get("channels", 4), changes.get("side", 8))
    converted = convert_state_dict(official.state_dict(), overrides=TWO)
    assert converted.architecture == "sit"
    assert converted.config["time_divisor"] == 1000
    assert converted.config["num_classes"] == 10
    assert len(converted.projectors) == len(changes.get("z_dims", ()))
    wanted = outputs(official, x, t / 1000, y)
    assert wanted.std() > 0.1
    torch.testing.assert_close(outputs(network(converted), x, t, y), wanted, rtol=1e-5, atol=1e-5)


def test_qk_norm_tells_the_heads():
    official, (x, t, y) = OfficialSiT(qk_norm=True, heads=4), inputs()
    converted = convert_state_dict(official.state_dict())
    assert converted.config["num_attention_heads"] == 4
    wanted = outputs(official, x, t / 1000, y)
    torch.testing.assert_close(outputs(network(converted), x, t, y), wanted, rtol=1e-5, atol=1e-5)


def test_sit_with_a_learned_variance():
    """Its second half of the output channels is thrown away, here already from the last layer."""
    official, (x, t, y) = OfficialSiT(learn_sigma=True), inputs()
    converted = convert_state_dict(official.state_dict(), "sit", TWO)
    model = network(converted)
    assert model.proj_out.out_features == 2 * 2 * 4
    assert "variance" in converted.notes[0]
    wanted = outputs(official, x, t / 1000, y).chunk(2, dim=1)[0]
    torch.testing.assert_close(outputs(model, x, t, y), wanted, rtol=1e-5, atol=1e-5)


def test_dit():
    """Whole timesteps are told as they are; the variance stays."""
    official, (x, t, y) = OfficialSiT(learn_sigma=True), inputs()
    converted = convert_state_dict(official.state_dict(), "dit", TWO)
    got = outputs(network(converted), x, t, y)
    assert got.shape == (3, 8, 8, 8)
    torch.testing.assert_close(got, outputs(official, x, t, y), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="--architecture dit or sit"):
        convert_state_dict(official.state_dict(), overrides=TWO)


def test_known_widths_are_the_named_sizes():
    assert {width: heads for _, width, heads in SIZES.values()} == ATTENTION_HEADS
    official = OfficialSiT(dim=384, heads=6, depth=1)
    assert convert_state_dict(official.state_dict()).config["num_attention_heads"] == 6
    with pytest.raises(ValueError, match=r"width 16; give num_attention_heads. Known widths: 384 \(6\)"):
        convert_state_dict(OfficialSiT().state_dict())


def test_a_network_without_labels():
    weights = {k: v for k, v in OfficialSiT().state_dict().items() if not k.startswith("y_embedder")}
    assert convert_state_dict(weights, overrides=TWO).config["num_classes"] == 0


def test_early_names_of_repa():
    """`decoder_blocks` count anew behind the `encoder_depth` first blocks; REPA's `--legacy` renames them alike."""
    official, (x, t, y) = OfficialSiT(depth=5, z_dims=(6,)), inputs()

    def early(key, depth=2):
        name, number, *rest = key.split(".")
        later = name == "blocks" and int(number) >= depth
        return ".".join(["decoder_blocks", str(int(number) - depth), *rest]) if later else key

    weights = {early(key) if key.startswith("blocks.") else key: v for key, v in official.state_dict().items()}
    assert sum(key.startswith("decoder_blocks.2.") for key in weights) == 10
    converted = convert_state_dict(weights, overrides=TWO)
    assert converted.config["num_layers"] == 5
    assert "its decoder_blocks are the blocks from 2 on" in converted.notes[0]
    wanted = outputs(official, x, t / 1000, y)
    torch.testing.assert_close(outputs(network(converted), x, t, y), wanted, rtol=1e-5, atol=1e-5)
    del weights["decoder_blocks.0.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"\(5 blocks of width 16\): it lacks blocks.2.mlp.fc2.bias"):
        convert_state_dict(weights, overrides=TWO)


@pytest.mark.parametrize("name", ["decoder_blocks.x.mlp.fc1.weight", "decoder_blocks.0", "decoder_blocks.1x.bias"])
def test_a_name_that_is_no_block_of_an_early_checkpoint_is_told(name):
    weights = OfficialSiT().state_dict()
    weights["decoder_blocks.0.mlp.fc1.weight"] = torch.ones(1, 1)
    with pytest.raises(ValueError, match=f"it has .*{name}.* unknown"):
        convert_state_dict({**weights, name: torch.ones(1)}, overrides=TWO)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_baseline_of_repa_has_a_projector_to_nothing():
    """`z_dims=[0]`: it tells a SiT, also of a learned variance, and is left out."""
    official, (x, t, y) = OfficialSiT(z_dims=(0,)), inputs()
    assert official.state_dict()["projectors.0.4.weight"].shape == (0, 24)
    converted = convert_state_dict(official.state_dict(), overrides=TWO)
    assert converted.projectors == []
    assert converted.notes == ("A baseline of REPA: its projector, which gives no channel, was left out.",)
    wanted = outputs(official, x, t / 1000, y)
    torch.testing.assert_close(outputs(network(converted), x, t, y), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'x_embedder.proj.bias' is \\(0,\\)"):
        convert_state_dict({**official.state_dict(), "x_embedder.proj.bias": torch.empty(0)}, overrides=TWO)


# Positions


def test_positions_may_drift_but_not_differ():
    weights = OfficialSiT(side=12).state_dict()
    table = weights["pos_embed"]
    convert_state_dict({**weights, "pos_embed": table + 1e-4}, overrides=TWO)
    convert_state_dict({**weights, "pos_embed": table.half()}, overrides=TWO)
    turned = table.unflatten(1, (6, 6)).transpose(1, 2).flatten(1, 2)
    for wrong in (turned, table.roll(8, -1), table.roll(4, -1), torch.randn_like(table)):
        with pytest.raises(ValueError, match="not the fixed sin-cos grid"):
            convert_state_dict({**weights, "pos_embed": wrong}, overrides=TWO)


def test_sizes_that_positions_do_not_tell():
    weights = OfficialSiT().state_dict()
    table = weights.pop("pos_embed")
    with pytest.raises(ValueError, match="no pos_embed to read the size"):
        convert_state_dict(weights, overrides=TWO)
    assert convert_state_dict(weights, overrides={**TWO, "sample_size": 24}).config["sample_size"] == 24
    with pytest.raises(ValueError, match="15 places, no square"):
        convert_state_dict({**weights, "pos_embed": table[:, :15]}, overrides=TWO)
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 16, 16\); sample_size 12 x 12 at patch 2 makes"):
        convert_state_dict({**weights, "pos_embed": table}, overrides={**TWO, "sample_size": 12})


# Names


def test_names_that_are_missing_or_unknown():
    weights = OfficialSiT().state_dict()
    missing = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(ValueError, match=r"\(2 blocks of width 16\): it lacks blocks.1.mlp.fc2.bias\."):
        convert_state_dict(missing, overrides=TWO)
    more = {**weights, "cls_token": torch.ones(1), "blocks.0.attn.rope": torch.ones(1)}
    with pytest.raises(ValueError, match="it has cls_token, blocks.0.attn.rope, which are unknown"):
        convert_state_dict(more, overrides=TWO)
    with pytest.raises(ValueError, match=r"projectors.0 has 0.weight; a projector of REPA has 0.bias, 0.weight"):
        convert_state_dict({**weights, "projectors.0.0.weight": torch.ones(2, 2)}, overrides=TWO)
    with pytest.raises(ValueError, match=r"no checkpoint of DiT, SiT or REPA: it lacks x_embedder.proj.weight"):
        convert_state_dict(SiTTransformer2DModel(8, num_layers=1, hidden_size=16, num_attention_heads=2).state_dict())
    with pytest.raises(ValueError, match="architecture is one of sit, dit"):
        convert_state_dict(weights, "repa", TWO)


def test_where_weights_lie():
    one, two = {"a": torch.zeros(1)}, {"module._orig_mod.a": torch.ones(1)}
    both = {"model": one, "ema": two, "opt": {"state": {}}, "steps": 3}
    assert select_weights(both)[1] == "ema"
    assert torch.equal(select_weights(both)[0]["a"], torch.ones(1))
    assert torch.equal(select_weights(both, "model")[0]["a"], torch.zeros(1))
    assert select_weights({"state_dict": one})[1] == "state_dict"
    assert select_weights(one) == (one, "")
    with pytest.raises(ValueError, match="no weights 'ema'; it has 'model'"):
        select_weights({"model": one}, "ema")
    with pytest.raises(ValueError, match="it is one state dict"):
        select_weights(one, "ema")
    with pytest.raises(ValueError, match="has no state dict: it holds opt, steps"):
        select_weights({"opt": {}, "steps": 3})


# Files


def test_files_of_all_kinds(tmp_path):
    """With what training scripts save beside the weights; old and new formats; safetensors."""
    weights = OfficialSiT().state_dict()
    whole = {"ema": weights, "model": weights, "opt": {"state": {0: {"step": torch.ones(1)}}}, "steps": 4}
    whole["args"] = argparse.Namespace(resolution=256, cfg_prob=0.1)
    torch.save(whole, tmp_path / "new.pt")
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "flat.safetensors")
    for name in ("new.pt", "old.pt", "flat.safetensors"):
        found, _ = select_weights(read_checkpoint(tmp_path / name))
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_does_not_run(tmp_path):
    torch.save({"ema": OfficialSiT().state_dict(), "args": Harmful(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"holds pickled Python objects \(\S*open\), which may run code"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save(OfficialSiT().state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in {"text.pt": b"hello", "empty.pt": b"", "half.pt": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of torch, or it is broken"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "text.safetensors").write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_checkpoint(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")


# The command


def run(*words):
    return command.run(read_settings("convert", [str(word) for word in words]))


def saved(tmp_path, **changes):
    official = OfficialSiT(**changes)
    other = {
        key: torch.zeros_like(value) if key != "pos_embed" else value for key, value in official.state_dict().items()
    }
    torch.save(
        {"ema": official.state_dict(), "model": {f"module.{k}": v for k, v in other.items()}}, tmp_path / "c.pt"
    )
    return official


def test_convert_repa(tmp_path, capsys):
    official, (x, t, y) = saved(tmp_path, z_dims=(6, 9)), inputs()
    assert run(tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", json.dumps(TWO)) == 0
    told = capsys.readouterr().out
    assert "weights 'ema'" in told
    assert "2 blocks of width 16 with 2 heads, patch 2, 10 classes" in told
    assert "2 projectors" in told
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "FlowMatchSDEScheduler"
    torch.testing.assert_close(
        outputs(pipe.transformer, x, t, y), outputs(official, x, t / 1000, y), rtol=1e-5, atol=1e-5
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=2, output_type="pt").images.shape == (1, 4, 8, 8)
    alone = SiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    torch.testing.assert_close(outputs(alone, x, t, y), outputs(pipe.transformer, x, t, y), rtol=0, atol=0)
    for at in range(2):
        projector = Projector.from_pretrained(tmp_path / "out" / "heads" / f"projector-{at}")
        tokens = torch.randn(2, 16, 16)
        torch.testing.assert_close(projector(tokens, (4, 4)), official.projectors[at](tokens))


def test_convert_reg(tmp_path, capsys):
    """The class token's layers become the pipeline's; its place in the positions, the first, is empty."""
    official, (x, t, y) = OfficialSiT(z_dims=(6,)), inputs()
    generator = torch.Generator().manual_seed(2)
    shapes = {"cls_projectors2.weight": (16, 6), "cls_projectors2.bias": (16,), "wg_norm.weight": (16,)}
    shapes |= {"wg_norm.bias": (16,), "final_layer.linear_cls.weight": (6, 16), "final_layer.linear_cls.bias": (6,)}
    token = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights = {**official.state_dict(), **token}
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 16), weights["pos_embed"]], 1)
    torch.save({"ema": weights}, tmp_path / "c.pt")
    assert run(tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", json.dumps(TWO)) == 0
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        outputs(pipe.transformer, x, t, y), outputs(official, x, t / 1000, y), rtol=1e-5, atol=1e-5
    )
    noisy, state = torch.randn(3, 6), torch.randn(3, 16)
    linear = torch.nn.functional.linear
    entered = torch.nn.functional.layer_norm(
        linear(noisy, token["cls_projectors2.weight"], token["cls_projectors2.bias"]), (16,), token["wg_norm.weight"],
        token["wg_norm.bias"], 1e-6,
    )  # fmt: skip
    left = linear(state, token["final_layer.linear_cls.weight"], token["final_layer.linear_cls.bias"])
    torch.testing.assert_close(pipe.class_token.enter(noisy), entered)
    torch.testing.assert_close(pipe.class_token.leave(state), left)
    weights["pos_embed"][0, 0, 3] = 1
    with pytest.raises(ValueError, match="class token of this REG checkpoint has a position"):
        convert_state_dict(weights, overrides=TWO)


def test_convert_dit(tmp_path, capsys):
    official, (x, t, y) = saved(tmp_path, learn_sigma=True), inputs()
    (tmp_path / "config.yaml").write_text("num_attention_heads: 2\nclass_dropout_prob: 0.2\n")
    words = (tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="--architecture"):
        run(*words)
    assert not (tmp_path / "out").exists()
    assert run(*words, "--architecture", "dit") == 0
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.transformer.config.class_dropout_prob == 0.2
    torch.testing.assert_close(outputs(pipe.transformer, x, t, y), outputs(official, x, t, y), rtol=1e-5, atol=1e-5)
    denoiser = Denoiser.from_pipe(pipe)
    assert denoiser.schedule.output == "epsilon"
    with torch.no_grad():
        eps = denoiser.predict(x, 400, denoiser.condition(class_labels=y)).eps
    torch.testing.assert_close(eps, outputs(official, x, torch.full((3,), 400.0), y)[:, :4], rtol=1e-5, atol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=2, guidance_scale=2.0, output_type="latent").images.shape == (1, 4, 8, 8)


def test_weights_and_sampler_by_name(tmp_path, capsys):
    saved(tmp_path)
    words = (tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", json.dumps(TWO))
    run(*words, "--weights", "model", "--path", "cosine", "--sampler", "ode")
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert not any(parameter.any() for parameter in pipe.transformer.parameters())
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.path) == ("FlowMatchODEScheduler", "cosine")
    assert main(["convert", *map(str, words)]) == 2
    assert "exists already; name another folder, or add --overwrite" in capsys.readouterr().err
    run(*words, "--overwrite")
    assert all(parameter.any() for parameter in SiTPipeline.from_pretrained(tmp_path / "out").transformer.parameters())


def test_projectors_of_encoders_of_one_name(tmp_path):
    """REPA's `--enc-type dinov2-vit-b,dinov2-vit-b`: each has a folder, and goes on with an encoder of its own."""
    official = saved(tmp_path, z_dims=(6, 6))
    run(tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", json.dumps(TWO))
    encoders = {}
    for name in ("teacher", "teacher-again"):
        net = torch.nn.Conv2d(4, 6, 2, stride=2)
        encoders[name] = Encoder.from_module(net, patch_size=2, channels=4, name="teacher")
    denoiser = Denoiser.from_pretrained(tmp_path / "out")
    objective = REPAObjective(denoiser, encoders, layer="blocks.0", projector_dim=24)
    assert load_heads(objective, tmp_path / "out") == {}
    tokens = torch.randn(2, 16, 16)
    heads = [part.module for part in objective.artifacts() if part.folder.startswith("heads/")]
    for head, theirs in zip(heads, official.projectors, strict=True):
        torch.testing.assert_close(head(tokens, (4, 4)), theirs(tokens))
    assert len({part.folder for part in objective.artifacts()}) == len(objective.artifacts())


@pytest.mark.parametrize("given", ['{"num_attention_heads": 2}', "config.json", "network.yaml"])
def test_the_networks_arguments_are_no_recipe(tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "SiTTransformer2DModel", "num_layers": 2}')
    (tmp_path / "network.yaml").write_text("num_attention_heads: 2\n")
    with pytest.raises(ValueError, match="holds arguments of the network: give them as --model_config"):
        read_settings("convert", ["c.pt", "--out", "out", "--config", given])
    (tmp_path / "recipe.yaml").write_text("checkpoint: c.pt\nout: out\n")
    assert read_settings("convert", ["--config", "recipe.yaml"]).checkpoint == "c.pt"
    (tmp_path / "other.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match="Unknown key 'learning_rate'"):
        read_settings("convert", ["--config", "other.yaml"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"heads": 2}', "--model_config has heads; SiTTransformer2DModel takes class_dropout_prob"),
        ('{"num_attention_heads": 2', "is no JSON or YAML"),
        ("missing.json", "is no file"),
        ('{"num_attention_heads": 2, "num_classes": 3}', "size mismatch for label_embed.weight"),
    ],
)
def test_bad_configs(tmp_path, config, message):
    saved(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
        run(tmp_path / "c.pt", "--out", tmp_path / "out", "--model_config", config)
    assert not (tmp_path / "out").exists()
