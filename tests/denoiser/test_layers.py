"""The layer table against real captures, an independent trace and published figures."""

import json
import shutil
import time
from collections import OrderedDict

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffusers_repr.capture import capture
from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser, GenericFamily, block_outputs, layer_table, list_layers
from diffusers_repr.denoiser import layers as layers_file
from diffusers_repr.denoiser.family_registry import family_by_name
from diffusers_repr.denoiser.layers import list_layers_from_config
from diffusers_repr.models.weights import build_on_meta
from tests.denoiser.test_denoiser import Blob, start
from tests.testers.cases import pairs, slow, some
from tests.testers.models import PIPELINES, SIZES, build, saved


@pytest.mark.parametrize(
    ("name", "detail"),
    pairs(
        sorted(PIPELINES),
        ("blocks", "all"),
        ("sdxl", "blocks"),
        *((name, "all") for name in ("class_unet", "dit", "flux", "pixart", "sana", "sd3")),
    ),
)
@torch.no_grad()
def test_every_listed_place_is_what_capture_reads(name, detail):
    denoiser, x_t, condition = start(name)
    layers = list_layers(denoiser, SIZES[name], detail)
    order = []
    with capture(denoiser.model, [layer.path for layer in layers], stop_early=False) as tape:
        for path in tape.layers:  # an independent trace of the order of completion
            denoiser.model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
        denoiser.predict(x_t, 261, condition)
    assert [layer.path for layer in layers] == order
    for layer in layers:
        feature, (h, w) = tape[layer.path], layer.grid
        if layer.kind == "map":
            assert feature.shape == (2, layer.channels, h, w), layer
        else:
            # the table assumes the pipeline's longest text
            assert feature.shape[0] == 2, layer
            assert feature.shape[2] == layer.channels, layer
            assert (feature.shape[1] > h * w) == (layer.text_tokens > 0), layer
            place = denoiser.family.grid(feature.shape[1], tuple(x_t.shape[2:]))
            assert place is not None, layer
            assert place[0] == layer.grid, layer
            assert place[1] == feature.shape[1] - h * w, layer
        assert layer.stride == SIZES[name][0] / h
        assert layer.module == type(denoiser.model.get_submodule(layer.path)).__name__
    shares = [layer.flops_share for layer in layers]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-3)
    assert min(shares) >= 0


@pytest.mark.parametrize("name", some(sorted(PIPELINES), "ddim", "dit", "flux", "pixart", "sana", "sd3", "sdxl"))
def test_what_the_table_holds(name):
    """Every transformer block, residual block and stage is in it; text and time never are."""
    denoiser = Denoiser.from_pipe(build(name))
    paths = [layer.path for layer in list_layers(denoiser, SIZES[name])]
    assert len(paths) == len(set(paths))
    wanted = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
              "FluxSingleTransformerBlock", "SanaTransformerBlock", "CrossAttnDownBlock2D", "UpBlock2D")  # fmt: skip
    for path, module in denoiser.model.named_modules():
        if type(module).__name__ in wanted:
            assert path in paths
    for layer in list_layers(denoiser, SIZES[name], "all"):
        assert not layer.path.startswith(("time_", "class_emb", "context_embedder", "caption", "adaln", "text"))


@pytest.mark.parametrize("name", ["flux", "sd3"])
@torch.no_grad()
def test_what_changes_with_the_text_alone_is_not_listed(name):
    """A layer that gives the same for two images holds text, however many tokens that has."""
    denoiser, x_t, condition = start(name)
    layers = [layer.path for layer in list_layers(denoiser, SIZES[name], "all")]
    parts = {part for path in layers for part in path.split(".")}
    assert not parts & {"ff_context", "norm1_context", "add_k_proj", "norm_added_q", "norm_q", "to_add_out"}
    first = [path for path in layers if path.startswith("transformer_blocks.0.")]  # later text has seen the image
    read = []
    for x in (x_t, x_t + 1):
        with capture(denoiser.model, first, stop_early=False) as tape:
            denoiser.predict(x, 261, condition)
        read.append(tape)
    assert len(first) > 5
    for path in first:
        assert not torch.equal(read[0][path], read[1][path]), path


def test_detail_all_has_what_blocks_has_and_more():
    denoiser = Denoiser.from_pipe(build("sd3"))
    blocks, everything = (list_layers(denoiser, SIZES["sd3"], detail) for detail in ("blocks", "all"))
    assert {layer.path for layer in blocks} < {layer.path for layer in everything}
    assert "transformer_blocks.0.attn" in {layer.path for layer in everything}


def test_the_network_is_not_touched():
    pipe = build("sd")
    before = {k: (v.data_ptr(), v._version) for k, v in pipe.unet.state_dict().items()}
    pipe.unet.train()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    list_layers(Denoiser.from_pipe(pipe))
    assert before == {k: (v.data_ptr(), v._version) for k, v in pipe.unet.state_dict().items()}
    assert pipe.unet.training
    assert not calls


def test_an_offloaded_pipeline(monkeypatch):
    monkeypatch.setattr(layers_file, "architecture_key", lambda denoiser: None)  # nothing is kept: each is found anew
    pipe = build("dit")
    want = list_layers(Denoiser.from_pipe(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    assert list_layers(Denoiser.from_pipe(pipe)) == want
    pipe = build("dit")
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert list_layers(Denoiser.from_pipe(pipe)) == want


def test_what_was_found_is_kept_while_nothing_has_changed(monkeypatch, tmp_path):
    """Of one class, config, family, size, level and register of outputs."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return layer_table(*args, **kwargs)

    monkeypatch.setattr(layers_file, "layer_table", counted)
    monkeypatch.setattr(layers_file, "_TABLES", OrderedDict())
    monkeypatch.setattr(block_outputs, "_IMAGE_INDEX", dict(block_outputs._IMAGE_INDEX))
    pipe = build("class_unet")
    first = list_layers(Denoiser.from_pipe(pipe))
    list_layers(Denoiser.from_pipe(pipe)).clear()  # the caller's own
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype=torch.float16)
    assert list_layers(Denoiser.from_pipe(pipe)) == list_layers(Denoiser.from_pretrained(tmp_path)) == first
    assert len(calls) == 1
    smaller = Denoiser.from_pipe(pipe)
    assert list_layers(smaller, 8)[0].grid == (8, 8)
    assert len(list_layers(smaller, detail="all")) > len(first)
    assert len(calls) == 3
    other = build("class_unet")
    other.unet = type(other.unet).from_config({**other.unet.config, "layers_per_block": 3})
    assert len(list_layers(Denoiser.from_pipe(other))) > len(first)
    block_outputs.register_block_output("Blob", 1)
    assert list_layers(Denoiser.from_pipe(pipe)) == first
    assert len(calls) == 5


def test_bad_sizes():
    dit = Denoiser.from_pipe(build("dit"))
    with pytest.raises(ValueError, match="square images only"):
        list_layers(dit, (32, 48))
    with pytest.raises(ValueError, match="takes multiples of 4"):
        list_layers(dit, 33)


@torch.no_grad()
def test_any_module_by_a_generic_family():
    net = Blob()
    calls = []
    net.block.register_forward_hook(lambda *_: calls.append(1))
    family = GenericFamily("x", "t", channels=2, grid_fn=lambda tokens, size: (size[0] // 2, size[1] // 2))
    layers = list_layers(Denoiser(net, DDPMScheduler(), family=family), (8, 12))
    assert [(layer.path, layer.kind, layer.channels, layer.grid) for layer in layers] == [
        ("embed", "map", 8, (4, 6)),
        ("block", "tokens", 8, (4, 6)),
        ("out", "map", 2, (8, 12)),
    ]
    assert not calls
    assert all(p.device.type == "cpu" for p in net.parameters())


# Published figures: methods/intermediate_activations.md, 0.4 and 0.5

ADM_256 = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "resnet_time_scale_shift": "scale_shift",
    "upsample_type": "resnet",
    "downsample_type": "resnet",
    "attn_norm_num_groups": 32,
}
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def table(cls, config, size, stride):
    model = build_on_meta(cls, config)
    layers = layer_table(model, family_by_name(cls.__name__).bound_to(model.config), (size, size), stride)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    return {layer.path: layer for layer in layers}


def test_adm_256():
    layers = table(UNet2DModel, ADM_256, 256, 1)
    rows = [("mid_block", 1024, 8, 25.9)]
    for stage, channels, grid, shares in (
        (0, 1024, 8, (26.1, 26.3, 26.9)),
        (1, 1024, 16, (27.7, 28.5, 31.0)),
        (2, 512, 32, (32.1, 33.0, 35.6)),
        (3, 512, 64, (38.4, 41.1, 50.3)),
        (4, 256, 128, (54.1, 56.9, 66.6)),
        (5, 256, 256, (77.7, 88.8, 99.9)),
    ):
        kind = "attentions" if stage < 3 else "resnets"
        rows += [(f"up_blocks.{stage}.{kind}.{at}", channels, grid, shares[at]) for at in range(2)]
        rows.append((f"up_blocks.{stage}", channels, min(2 * grid, 256), shares[2]))
    for path, channels, grid, share in rows:
        layer = layers[path]
        assert (layer.kind, layer.channels, layer.grid) == ("map", channels, (grid, grid)), path
        assert 100 * layer.flops_share == pytest.approx(share, abs=0.051), path


@pytest.mark.parametrize(
    ("config", "size", "shares"),
    [(SD1, 64, (32.5, 35.8, 54.6, 75.4, 84.3, 100)), slow(SD2, 96, (33.7, 36.4, 52.4, 70.9, 81.2, 100))],
)
def test_stable_diffusion(config, size, shares):
    layers = table(UNet2DConditionModel, config, size, 8)
    paths = ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3.attentions.0", "up_blocks.3")
    channels, strides = (1280, 1280, 1280, 640, 320, 320), (64, 32, 16, 8, 8, 8)
    for path, width, stride, share in zip(paths, channels, strides, shares, strict=True):
        assert (layers[path].channels, layers[path].stride) == (width, stride), path
        assert 100 * layers[path].flops_share == pytest.approx(share, abs=0.051), path


def test_dit_xl():
    layers = table(DiTTransformer2DModel, {}, 32, 8)
    layer = layers["transformer_blocks.13"]
    assert (layer.kind, layer.channels, layer.grid, layer.stride) == ("tokens", 1152, (16, 16), 16)
    assert round(100 * layer.flops_share, 1) == 50.0


@pytest.mark.parametrize(
    ("cls", "config"), [slow(UNet2DConditionModel, SDXL), (FluxTransformer2DModel, {"guidance_embeds": True})]
)
def test_large_models_take_seconds_and_no_memory(cls, config):
    start_time = time.process_time()
    layers = table(cls, config, 128, 8)
    assert time.process_time() - start_time < 30  # seconds, also on a slow machine
    last = list(layers.values())[-1]
    assert last.flops_share == 1
    if cls is FluxTransformer2DModel:
        assert layers["single_transformer_blocks.0"].text_tokens == 0
        assert layers["transformer_blocks.0"].grid == (64, 64)


# From configs alone


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Folders of the pipelines without any weights."""
    root = tmp_path_factory.mktemp("bare")
    for name in PIPELINES:
        skip = shutil.ignore_patterns("*.safetensors", "*.bin", "tokenizer*", "text_encoder*")
        shutil.copytree(saved(name), root / name, ignore=skip)
    return root


@pytest.mark.parametrize("name", some(sorted(PIPELINES), "ddpm", "dit", "flux", "pixart", "sana", "sd3", "sdxl"))
def test_from_configs_alone(name, bare):
    want = list_layers(Denoiser.from_pipe(build(name)), SIZES[name])
    assert list_layers_from_config(bare / name, SIZES[name]) == want
    if name in ("ddpm", "dit"):  # the configured size
        assert list_layers_from_config(str(bare / name)) == list_layers(Denoiser.from_pipe(build(name)))


def test_the_command(bare, capsys):
    assert main(["layers", str(bare / "sd"), "--image_size", "32", "48"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "kind", "channels", "grid", "stride", "cum.", "FLOPs", "module"]
    assert any(line.split()[:5] == ["up_blocks.1", "map", "16", "8x12", "4"] for line in lines)
    assert lines[-1].split()[-2:] == ["100.0%", "Conv2d"]
    assert main(["layers", str(bare / "dit"), "--json", "--detail", "all"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == json.loads(json.dumps([r.to_dict() for r in list_layers_from_config(bare / "dit", detail="all")]))


def test_the_commands_errors(bare, capsys, tmp_path):
    def says(*argv):
        assert main(["layers", *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "is no pipeline folder: it has no model_index.json" in says(tmp_path)
    assert "There is no folder" in says(tmp_path / "nothing")
    assert "square images only" in says(bare / "dit", "--image_size", 32, 64)
    assert "one side, or height and width" in says(bare / "sd", "--image_size", 32, 32, 32)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "prior": ["diffusers", "Y"]}))
    assert "has no component named unet or transformer" in says(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["nowhere", "Net"]}))
    assert "unet is 'Net' of the library 'nowhere'; a file may name classes of diffusers" in says(tmp_path)
    shutil.copytree(bare / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").unlink()
    assert "config.json" in says(tmp_path / "sd")


def test_tables_of_what_has_no_text_but_an_address_are_not_kept():
    """Another function may get the address of one that is gone."""
    pipe = build("class_unet")
    rows = Denoiser.from_pipe(pipe)
    assert layers_file.architecture_key(rows) is not None
    rows.family.told = lambda: 1
    assert layers_file.architecture_key(rows) is None
