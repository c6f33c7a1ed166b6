"""Weights and configs of others, in every network and head of ours, and checkpoints to convert."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from diffusers_repr.cli import main
from diffusers_repr.heads import DepthHead, JointHead, KNNHead, LinearHead, MLPHead, Projector, ReadoutHead
from diffusers_repr.models import JointViTModel, NoisyClassifier, SiTTransformer2DModel
from diffusers_repr.models.checkpoint import read_checkpoint
from diffusers_repr.models.convert import convert_state_dict
from diffusers_repr.models.weights import check_tensor
from tests.hostile.cases import changed, copied, weights, written
from tests.models.official_sit import OfficialSiT

LAYERS = {"layers": ["a", "b"], "channels": [8, 4], "time_width": 8}
MODELS = {
    "sit": lambda: SiTTransformer2DModel(8, 2, 1, num_layers=1, hidden_size=16, num_attention_heads=2, num_classes=3),
    "joint_vit": lambda: JointViTModel(8, 2, 1, num_layers=1, hidden_size=16, num_attention_heads=2, num_classes=3),
    "noisy_classifier": lambda: NoisyClassifier(
        1, 3, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8
    ),
    "linear": lambda: LinearHead(6, 3),
    "mlp": lambda: MLPHead(6, 3, hidden_features=(4,)),
    "knn": lambda: KNNHead(6, 3, bank_size=2, k=1),
    "joint": lambda: JointHead(6, 3, norm="batch"),
    "projector": lambda: Projector(6, 3, hidden_dim=4),
    "readout": lambda: ReadoutHead(width=8, bottleneck=4, output_widths=(4, 4), **LAYERS),
    "depth": lambda: DepthHead(hidden=(8,), **LAYERS),
}


def first(held, change, kind=torch.float32):
    """The tensors with the first one of a kind changed."""
    key = next(name for name in sorted(held) if held[name].dtype == kind)
    return {**held, key: change(held[key])}


def spoilt(value):
    value.flatten()[-1] = torch.nan
    return value


FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = {
    "one NaN": (weights(lambda w: first(w, spoilt)), "has 1 of .* values that are not finite"),
    "infinite halves": (weights(lambda w: first(w, lambda v: (v * 0 - torch.inf).half())), "not finite"),
    "whole numbers": (weights(lambda w: first(w, lambda v: v.int())), "holds torch.int32; floating-point"),
    "another shape": (weights(lambda w: first(w, lambda v: v[None])), "with this config has"),
    "a weight more": (weights(lambda w: {**w, "extra": torch.ones(1)}), "'extra' is none of"),
    "a weight less": (weights(lambda w: dict(list(sorted(w.items()))[1:])), "weights of .* are missing"),
    "a huge header": (written(FILE, (1 << 40).to_bytes(8, "little") + b"{}"), "is no safetensors file"),
    "no file of weights": (written(FILE, b""), "is no safetensors file"),
    "a depth": (changed("config.json", "num_layers", to=10**9), "num_layers is 1000000000"),
    "a width": (changed("config.json", "in_features", to=10**18), "in_features is 1000000000000000000"),
    "a side": (changed("config.json", "sample_size", to=[10**6, 8]), "sample_size is 1000000"),
    "no object": (written("config.json", []), r"is a list of 0|object"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a folder of each model, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        if not (root / name).is_dir():
            MODELS[name]().save_pretrained(root / name)
        return root / name

    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_checked_and_loads(name, saved, tmp_path):
    folder = copied(saved(name), tmp_path / "good")
    model = type(MODELS[name]()).from_pretrained(folder)
    held = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert next(held.parameters(), held.state_dict()["mean"] if name == "knn" else None).dtype == torch.bfloat16
    bad = copied(folder, tmp_path / "bad", WEIGHTS["one NaN"][0])
    with pytest.raises(ValueError, match="not finite") as caught:
        type(model).from_pretrained(bad)
    assert str(bad / FILE) in str(caught.value)


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("name", ["sit", "linear"])
def test_every_fault_is_named(name, case, saved, tmp_path):
    edit, message = WEIGHTS[case]
    folder = copied(saved(name), tmp_path / "bad", edit)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        type(MODELS[name]()).from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 800


def test_shards_and_variants_are_checked_too(saved, tmp_path):
    model = SiTTransformer2DModel.from_pretrained(saved("sit"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB", variant="fp16")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    SiTTransformer2DModel.from_pretrained(tmp_path / "sharded", variant="fp16")
    bad = copied(tmp_path / "sharded", tmp_path / "bad", weights(lambda w: first(w, spoilt), shards[1].name))
    with pytest.raises(ValueError, match="not finite") as caught:
        SiTTransformer2DModel.from_pretrained(bad, variant="fp16")
    assert str(bad / shards[1].name) in str(caught.value)
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    mapped = json.loads((tmp_path / "sharded" / index).read_text())["weight_map"]
    outside = {"weight_map": dict.fromkeys(mapped, "../" + shards[0].name)}
    with pytest.raises(ValueError, match="allowed is a relative path inside the folder"):
        SiTTransformer2DModel.from_pretrained(copied(bad, tmp_path / "out", written(index, outside)), variant="fp16")


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_a_config_takes_no_memory_before_the_weights_are_looked_at(name, saved, tmp_path):
    sizes = {"in_features": 1 << 24, "num_classes": 1 << 24}  # a petabyte
    bad = copied(saved(name), tmp_path / "bad", *(changed("config.json", key, to=size) for key, size in sizes.items()))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors': the tensor .* with this config has"):
        (LinearHead if name == "linear" else MLPHead).from_pretrained(bad)


def test_pickles_are_read_as_tensors_alone(saved, tmp_path):
    """diffusers falls back to `.bin`; objects in it are refused by torch, and its numbers are checked by us."""
    folder = copied(saved("linear"), tmp_path / "bin")
    (folder / FILE).unlink()
    state = LinearHead.from_pretrained(saved("linear")).state_dict()
    torch.save({**state, "mean": state["mean"] * torch.nan}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="'mean' has 6 of 6 values that are not finite"):
        LinearHead.from_pretrained(folder)

    torch.save({**state, "mean": Command(f"touch {tmp_path}/RAN")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError)):
        LinearHead.from_pretrained(folder)
    assert not (tmp_path / "RAN").exists()


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("noisy_classifier", "noise_schedule", {"half_log_snr": [1]}),
        ("noisy_classifier", "noise_schedule", {"kind": "vp", "half_log_snr": ["x"]}),
        ("noisy_classifier", "id2label", 3),
        ("noisy_classifier", "layers_per_block", 10**6),
        ("joint_vit", "id2label", ["a"]),
        ("joint", "dropout", "x"),
        ("readout", "base_config", "x"),
        ("readout", "timestep_range", [0, None]),
        ("readout", "layers", None),
        ("depth", "hidden", [10**30]),
        ("projector", "kernel_size", 10**9),
        ("mlp", "hidden_features", 5),
        ("knn", "bank_size", None),
        ("sit", "mlp_ratio", 1e300),
        ("sit", "hidden_size", 0),
    ],
)
def test_configs_that_fit_no_class(name, field, value, saved, tmp_path):
    folder = copied(saved(name), tmp_path / "bad", changed("config.json", field, to=value))
    with pytest.raises(ValueError, match="config.json: ") as caught:
        type(MODELS[name]()).from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_running_variances_below_zero(saved, tmp_path):
    folder = copied(saved("joint"), tmp_path / "bad", weights(lambda w: {**w, "norm1.running_var": -torch.ones(6)}))
    with pytest.raises(ValueError, match="running variance of this JointHead has values below 0"):
        JointHead.from_pretrained(folder)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_looked_at(kind):
    check_tensor(torch.ones(3).to(kind), "x", True)
    with pytest.raises(ValueError, match="x has 1 of 3 values that are not finite"):
        check_tensor(torch.tensor([1, torch.nan, 1]).to(kind), "x", True)


# convert


@pytest.fixture(scope="module")
def official():
    return OfficialSiT(side=4).state_dict()


CHECKPOINTS = {
    "NaN": (lambda w: {**w, "blocks.0.attn.proj.weight": w["blocks.0.attn.proj.weight"] * torch.nan},
            "'blocks.0.attn.proj.weight' has .* values that are not finite"),
    "whole numbers": (lambda w: {**w, "final_layer.linear.bias": w["final_layer.linear.bias"].int()},
                      "'final_layer.linear.bias' holds torch.int32"),
    "a block far away": (lambda w: {**w, "blocks.999999999.x": torch.ones(1)}, "block '999999999'; allowed are 512"),
    "another rank": (lambda w: {**w, "x_embedder.proj.weight": torch.ones(4, 4)}, "'x_embedder.proj.weight' is"),
    "nothing in it": (lambda w: {**w, "blocks.0.mlp.fc1.weight": torch.ones(8, 0)}, "'blocks.0.mlp.fc1.weight' is"),
    "flat positions": (lambda w: {**w, "pos_embed": torch.ones(4)}, r"'pos_embed' is \(4,\)"),
    "a flat projector": (lambda w: {**w, **{f"projectors.0.{i}.{e}": torch.ones(2) for i in (0, 2, 4)
                                            for e in ("weight", "bias")}}, r"'projectors.0.0.weight' is \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_of_others(case, official, tmp_path, capsys):
    change, message = CHECKPOINTS[case]
    with pytest.raises(ValueError, match=message):
        convert_state_dict(change(dict(official)), "sit")
    if case == "NaN":
        save_file({k: v.contiguous() for k, v in change(dict(official)).items()}, tmp_path / "x.safetensors")
        out = tmp_path / "out"
        assert main(["convert", str(tmp_path / "x.safetensors"), "--architecture", "sit", "--out", str(out)]) == 2
        told = capsys.readouterr().err
        assert "x.safetensors" in told
        assert "blocks.0.attn.proj.weight" in told
        assert not out.exists()


def test_a_checkpoint_with_objects_is_not_unpickled(tmp_path):
    torch.save({"ema": Command(f"touch {tmp_path}/RAN")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="pickled Python objects"):
        read_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "RAN").exists()
