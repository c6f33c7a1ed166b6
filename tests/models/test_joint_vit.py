"""The joint vision transformer: its clean and its noisy path, patches, sizes, its earlier form."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from diffusers_repr import FeatureExtractor
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.models import JointViTModel
from diffusers_repr.models.joint_vit import patchify, unpatchify

TINY = {
    "sample_size": (8, 4),
    "patch_size": 2,
    "in_channels": 2,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_classes": 3,
}
TIME = ("time_embed.", ".modulation.")


def tiny(moved=True, seed=0, **changes) -> JointViTModel:
    torch.manual_seed(seed)
    model = JointViTModel(**TINY | changes).double().eval()
    if moved:  # so that the time acts strongly, and has biases
        with torch.no_grad():
            for block in model.blocks:
                block.modulation.weight.normal_(std=0.3)
                block.modulation.bias.normal_(std=0.3)
    return model


def images(*size, seed=1):
    return torch.randn(3, 2, *(size or (8, 4)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def is_time(name):
    return name.startswith(TIME[0]) or TIME[1] in name


def test_the_clean_path_has_no_part_of_the_time_path():
    model, x = tiny(), images()
    out = model(x)
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2])).backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for name, p in parameters.items() if is_time(name) or name.startswith("proj_out"))
    assert all(
        float(p.grad.abs().sum()) > 0
        for name, p in parameters.items()
        if not is_time(name) and not name.startswith("proj_out")
    )
    with torch.no_grad():
        for name, p in parameters.items():
            if is_time(name):
                p.fill_(float("nan"))
        again = model(x)
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.sample, out.sample)
    assert model(x, 5).sample.isnan().all()


@pytest.mark.parametrize(("form", "modulation"), [("hybvit", "token"), ("hybvit", "channel"), ("early", "token")])
def test_modulation_of_zero_is_the_network_without_a_timestep(form, modulation):
    model, x = tiny(moved=False, modulation=modulation, form=form), images()
    with torch.no_grad():
        assert (model(x, 100).sample - model(x, 900).sample).abs().max() > 1e-3 or form == "early"
        for block in model.blocks:
            if form == "hybvit":
                block.modulation.weight.zero_()
        plain, timed = model(x), model(x, torch.tensor([0, 400, 999]))
    assert torch.equal(plain.sample, timed.sample)
    assert torch.equal(plain.logits, timed.logits)


@pytest.mark.parametrize(
    ("form", "modulation", "modulate_mlp"),
    [("hybvit", "token", True), ("hybvit", "channel", False), ("early", "token", False), ("early", "channel", True)],
)
def test_equals_the_formulas_written_out(form, modulation, modulate_mlp):
    """By plain matrix products, one token path at a time."""
    model, x = tiny(form=form, modulation=modulation, modulate_mlp=modulate_mlp), images()
    times = torch.tensor([3.0, 250.5, 999.0])
    state = model.state_dict()

    def affine(name, value):
        return value @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def norm(name, value):
        value = value - value.mean(-1, keepdim=True)
        value = value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return value * state[f"{name}.weight"] + state[f"{name}.bias"]

    assert ("blocks.0.attn.to_q.bias" in state) == (form == "early")
    width = 9 if modulation == "token" else 16
    if form == "early":
        rates = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        waves, between = times[:, None] * rates, F.silu
        waves = torch.cat([waves.cos(), waves.sin(), torch.zeros(3, width % 2)], dim=1).double()
    else:
        rates = (-math.log(10000) * torch.arange(8, dtype=torch.float32) / 7).exp()
        waves, between = times[:, None] * rates, F.gelu
        waves = torch.cat([waves.sin(), waves.cos()], dim=1).double()
    temb = affine("time_embed.linear_2", between(affine("time_embed.linear_1", waves)))
    h = torch.stack([
        x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(0, 2, 3, 1).reshape(3, -1)
        for r in range(4) for c in range(2)
    ], dim=1)  # fmt: skip
    h = affine("patch_embed", h)
    h = torch.cat([state["class_token"].expand(3, 1, 16), h], dim=1) + state["positions"]
    for i in range(2):
        scale, shift = affine(f"blocks.{i}.modulation", F.silu(temb)).split(width, dim=1)
        axes = (slice(None), slice(None), None) if modulation == "token" else (slice(None), None)
        h = h * (1 + scale[axes]) + shift[axes]
        normed = norm(f"blocks.{i}.norm1", h)
        q, k, v = (
            affine(f"blocks.{i}.attn.to_{name}", normed).unflatten(-1, (2, 8)).transpose(1, 2) for name in "qkv"
        )
        mixed = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        h = h + affine(f"blocks.{i}.attn.to_out.0", mixed.transpose(1, 2).flatten(2))
        if modulate_mlp:
            h = h * (1 + scale[axes]) + shift[axes]
        hidden = F.gelu(affine(f"blocks.{i}.ff.net.0.proj", norm(f"blocks.{i}.norm2", h)))
        h = h + affine(f"blocks.{i}.ff.net.2", hidden)
    with torch.no_grad():
        out = model(x, times)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the time's waves are float32
    torch.testing.assert_close(out.logits, affine("classifier.1", norm("classifier.0", h[:, 0])), **close)
    want = affine("proj_out", h[:, 1:])
    for place in range(8):
        r, c = place // 2, place % 2
        got = out.sample[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(0, 2, 3, 1).reshape(3, -1)
        torch.testing.assert_close(got, want[:, place], **close)


@pytest.mark.parametrize("modulation", ["token", "channel"])
def test_order_of_patches_matters_through_positions_and_token_modulation_alone(modulation):
    model = tiny(modulation=modulation)
    with torch.no_grad():
        model.positions.zero_()
    x, order = images(), torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])

    def shuffled(value):
        return unpatchify(patchify(value, 2)[:, order], (4, 2), 2)

    with torch.no_grad():
        torch.testing.assert_close(model(shuffled(x)).sample, shuffled(model(x).sample))
        torch.testing.assert_close(model(shuffled(x)).logits, model(x).logits)
        off = (model(shuffled(x), 300).sample - shuffled(model(x, 300).sample)).abs().max()
    assert off > 1e-2 if modulation == "token" else off < 1e-12


@pytest.mark.parametrize(("height", "width"), [(8, 4), (2, 6)])
def test_patches_there_and_back(height, width):
    x = images(height, width)
    patches = patchify(x, 2)
    assert patches.shape == (3, height * width // 4, 8)
    assert torch.equal(unpatchify(patches, (height // 2, width // 2), 2), x)
    # the last patch of the first row: rows, columns, channels
    want = [float(x[0, c, r, width - 2 + k]) for r in range(2) for k in range(2) for c in range(2)]
    assert patches[0, width // 2 - 1].tolist() == want


def test_the_papers_size():
    with torch.device("meta"):
        model = JointViTModel()
        large = JointViTModel(sample_size=96, patch_size=4)
        free = JointViTModel(sample_size=96, patch_size=4, modulation="channel")
        early = JointViTModel(form="early")
    assert model.num_parameters() == 11_185_068
    assert sum(p.numel() for p in model.blocks[0].modulation.parameters()) == 33_930  # (4 65 + 1) 2 65
    assert sum(p.numel() for p in large.blocks[0].modulation.parameters()) == 2_664_586  # 24^2 + 1 tokens
    assert sum(p.numel() for p in free.blocks[0].modulation.parameters()) == 295_680
    # 65 waves and not 384; the biases of 9 blocks
    assert early.num_parameters() == model.num_parameters() - (384 - 65) * 260 + 9 * 3 * 384


def test_few_patches_still_tell_the_time():
    """With as many waves as tokens, 4 patches and 2 frequencies, these two times nearly coincided."""
    near = {}
    for form in ("hybvit", "early"):
        model = tiny(sample_size=4, form=form, hidden_size=32)
        seen = []
        model.time_embed.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(images(4, 4), torch.tensor([28.0, 650.0, 651.0]))
        first, second, third = seen[0]
        near[form] = float((first - second).norm() / second.norm())
        assert (second - third).norm() > 0.1
    assert near["hybvit"] > 0.5
    assert near["early"] < 0.15


def test_a_new_networks_weights_are_those_of_xavier():
    """The three projections of attention have the spread of the one matrix that they are in the paper's code."""
    torch.manual_seed(0)
    model = JointViTModel(8, 4, 1, num_layers=1, hidden_size=256, num_attention_heads=4)
    block = model.blocks[0]
    spreads = {
        "attn.to_q": 1024,  # 256 in, 768 out
        "attn.to_v": 1024,
        "attn.to_out.0": 512,
        "ff.net.0.proj": 768,
        "modulation": 30,  # 20 in, 10 out
    }
    for name, fans in spreads.items():
        weight = block.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fans), rel=0.15 if name == "modulation" else 0.02)
    assert model.proj_out.weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 16)), rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.positions.std().item() == pytest.approx(1, rel=0.1)


def test_other_sizes():
    free, fixed = tiny(modulation="channel"), tiny()
    x = images(12, 6)
    with torch.no_grad():
        out = free(x, 10)
    assert out.sample.shape == x.shape
    assert out.logits.shape == (3, 3)
    with pytest.raises(ValueError, match=r"\(B, 2, 8, 4\); modulation='channel' takes other sizes; got \(3, 2, 12, 6"):
        fixed(x)
    for wrong in (x[:, :1], x[0], x[..., :5]):
        with pytest.raises(ValueError, match=r"takes x_t \(B, 2, H, W\)"):
            free(wrong)
    with pytest.raises(ValueError, match="2 timesteps for 3 samples"):
        free(x, torch.tensor([1, 2]))


def test_without_classes():
    model = tiny(num_classes=0)
    sample, logits = model(images(), 3, return_dict=False)
    assert sample.shape == (3, 2, 8, 4)
    assert logits is None


def test_bad_settings():
    for settings, message in (
        ({"sample_size": 9}, "multiples of patch_size 2"),
        ({"hidden_size": 15}, "of num_attention_heads 2"),
        ({"modulation": "head"}, "one of token, channel"),
        ({"num_classes": -1}, "at least 0"),
        ({"id2label": ["a"]}, "must name the ids 0 to 2"),
        ({"form": "paper"}, "one of hybvit, early"),
        ({"hidden_size": 2}, "hidden_size of at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            JointViTModel(**TINY | settings)


def test_saved_and_loaded(tmp_path):
    model = tiny(id2label=["a", "b", "c"]).float()
    model.save_pretrained(tmp_path)
    again = JointViTModel.from_pretrained(tmp_path)
    assert again.labels == ["a", "b", "c"]
    assert dict(again.config)["id2label"] == {"0": "a", "1": "b", "2": "c"}
    x = images().float()
    assert torch.equal(again(x, 3).sample, model(x, 3).sample)
    assert tiny().labels == ["0", "1", "2"]


EARLY_LOGITS = [[-0.025187, -0.132690, 0.062591], [-0.025499, -0.132830, 0.062659]]
EARLY_ROW = [[0.494888, -0.221941, 0.489044, -0.432826], [0.499868, -0.257111, 0.290931, -0.229224]]


def test_a_folder_of_the_earlier_form_loads_as_it_was(tmp_path):
    """Its config has no `form`. The numbers are those that the class gave before it had one."""
    made = JointViTModel(**TINY, form="early", modulate_mlp=False)
    with torch.no_grad():
        for at, p in enumerate(made.parameters()):
            places = torch.arange(p.numel(), dtype=torch.float64) * (0.37 + at)
            p.copy_((0.3 * places.sin()).float().view_as(p))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("form") == "early"
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = JointViTModel.from_pretrained(tmp_path)
    assert (model.config.form, model.config.modulate_mlp) == ("early", False)
    x = (torch.arange(128).float() * 0.7).cos().view(2, 2, 8, 4)
    out = model(x, torch.tensor([28.0, 650.0]))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.logits, torch.tensor(EARLY_LOGITS), **close)
    torch.testing.assert_close(out.sample[:, 1, 3], torch.tensor(EARLY_ROW), **close)
    model.save_pretrained(tmp_path / "again")  # says what it is from now on
    assert json.loads((tmp_path / "again" / "config.json").read_text())["form"] == "early"
    assert JointViTModel.from_config(JointViTModel.load_config(tmp_path)).config.form == "early"
    assert JointViTModel.from_config(model.config).config.form == "early"
    del config["modulate_mlp"]
    assert JointViTModel.from_config(config).config.modulate_mlp is False
    # arguments, not a saved config: a new network
    assert JointViTModel.from_config(dict(TINY)).config.form == "hybvit"
    assert JointViTModel.from_config(tiny().config).config.form == "hybvit"


def test_what_the_package_reads():
    model = tiny().float()
    denoiser = Denoiser(model, DDPMScheduler())
    layers = {layer.path: layer for layer in list_layers(denoiser)}
    assert layers["blocks.1"].grid == (4, 2)
    assert layers["blocks.1"].text_tokens == 1
    assert layers["proj_out"].text_tokens == 0
    found = FeatureExtractor(denoiser, ["blocks.0", "proj_out"], 261)(torch.rand(3, 2, 8, 4))
    assert found.features["blocks.0"].shape == (3, 9, 16)
    assert found.as_map("blocks.0").shape == (3, 16, 4, 2)
    assert torch.equal(found.as_map("blocks.0").flatten(2).mT, found.features["blocks.0"][:, 1:])
    x = torch.randn(2, 2, 8, 4)
    assert torch.equal(denoiser.predict(x, 7).eps, model(x, torch.tensor([7, 7])).sample)
    with pytest.raises(ValueError, match="takes no class_labels"):
        denoiser.condition(class_labels=[1], batch=2)
