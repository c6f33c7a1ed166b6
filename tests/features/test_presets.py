"""Published choices: every layer exists in its architecture with the channels and stride of the source's table."""

import dataclasses
import functools

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, EDMEulerScheduler, UNet2DConditionModel, UNet2DModel

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.capture import capture
from diffusers_repr.denoiser.family_registry import family_by_name
from diffusers_repr.denoiser.layers import layer_table
from diffusers_repr.features.presets import FAMILIES, edm_sigma, find_preset, list_presets, presets
from diffusers_repr.models.weights import build_on_meta
from tests.testers.models import build

ADM = {
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
DDPM = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
DDPMPP = {
    "sample_size": 32,
    "block_out_channels": (256, 256, 256),
    "layers_per_block": 4,
    "attention_head_dim": None,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "upsample_type": "resnet",
    "downsample_type": "resnet",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
SD = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# family -> class, config, x_0's side, the VAE's stride
NETWORKS = {
    "sd": (UNet2DConditionModel, SD, 64, 8),
    "adm-256": (UNet2DModel, ADM, 256, 1),
    "dit-xl-2": (DiTTransformer2DModel, DIT, 32, 8),
    "ddpm-cifar10": (UNet2DModel, DDPM, 32, 1),
    "edm-ddpm-cifar10": (UNet2DModel, DDPM, 32, 1),
    "ddpmpp-cifar10": (UNet2DModel, DDPMPP, 32, 1),
    "edm-ddpmpp-cifar10": (UNet2DModel, DDPMPP, 32, 1),
}
# layer -> channels, image pixels a cell: the sources' tables
SD_TABLE = {
    "mid_block": (1280, 64),
    "up_blocks.0.resnets.0": (1280, 64),
    "up_blocks.0.resnets.1": (1280, 64),
    "up_blocks.0.resnets.2": (1280, 64),
    "up_blocks.0": (1280, 32),
    "up_blocks.1.resnets.0": (1280, 32),
    "up_blocks.1.resnets.1": (1280, 32),
    "up_blocks.1.resnets.2": (1280, 32),
    "up_blocks.1.attentions.0": (1280, 32),
    "up_blocks.1.attentions.1": (1280, 32),
    "up_blocks.1": (1280, 16),
    "up_blocks.2.resnets.0": (640, 16),
    "up_blocks.2.resnets.1": (640, 16),
    "up_blocks.2.resnets.2": (640, 16),
    "up_blocks.2.attentions.0": (640, 16),
    "up_blocks.2.attentions.1": (640, 16),
    "up_blocks.2": (640, 8),
    "up_blocks.3.resnets.0": (320, 8),
    "up_blocks.3.resnets.1": (320, 8),
    "up_blocks.3.resnets.2": (320, 8),
    "up_blocks.3.attentions.0": (320, 8),
}
ADM_TABLE = {
    "mid_block": (1024, 32),
    "up_blocks.1.attentions.1": (1024, 16),
    "up_blocks.1": (1024, 8),
    "up_blocks.2.attentions.0": (512, 8),
    "up_blocks.2.attentions.1": (512, 8),
    "up_blocks.2": (512, 4),
    "up_blocks.3.resnets.0": (512, 4),
    "up_blocks.3.resnets.1": (512, 4),
    "up_blocks.3": (512, 2),
    "up_blocks.4.resnets.0": (256, 2),
}
TABLES = {
    "sd": SD_TABLE,
    "adm-256": ADM_TABLE,
    "dit-xl-2": {"transformer_blocks.13": (1152, 16)},
    "ddpm-cifar10": {"up_blocks.1.resnets.2": (256, 4)},
    "edm-ddpm-cifar10": {"up_blocks.2.attentions.0": (256, 2)},
    "ddpmpp-cifar10": {"up_blocks.1.attentions.0": (256, 2)},
    "edm-ddpmpp-cifar10": {"up_blocks.1.attentions.1": (256, 2)},
}


@functools.cache
def table(family):
    cls, config, side, stride = NETWORKS[family]
    model = build_on_meta(cls, config)
    layers = layer_table(model, family_by_name(cls.__name__).bound_to(model.config), (side, side), stride)
    return {layer.path: layer for layer in layers}


@pytest.mark.parametrize("preset", list_presets(), ids=lambda p: f"{p.method}-{p.family}")
def test_layers_exist_with_the_channels_and_stride_of_the_source(preset):
    for path in preset.layers:
        layer = table(preset.family)[path]
        assert (layer.channels, layer.stride) == TABLES[preset.family][path]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_network_and_a_preset(family):
    assert family in NETWORKS
    assert list_presets(family=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_known_by_its_architecture(family):
    cls, config, _, _ = NETWORKS[family]
    scheduler = EDMEulerScheduler() if family.startswith("edm-") else DDPMScheduler()
    denoiser = Denoiser(build_on_meta(cls, config), scheduler)
    for preset in list_presets(family=family):
        assert find_preset(preset.method, denoiser) is preset
    others = {"hyperfeatures": "sd", "gdc": "adm-256", "ddae-tiny-imagenet": "dit-xl-2"}
    for method, own in others.items():
        if own != family:
            with pytest.raises(ValueError, match=f"choices for {own}, and this {cls.__name__} has another"):
                find_preset(method, denoiser)


def test_odise_reads_inputs_after_the_skip_is_joined():
    model = build_on_meta(UNet2DConditionModel, SD)
    family = family_by_name("UNet2DConditionModel").bound_to(model.config)
    x_t = torch.empty(1, 4, 64, 64, device="meta")
    inputs = family.example(1, "meta")
    with torch.no_grad(), capture(model, presets("odise").layers, "input") as tape:
        model(x_t, torch.zeros(1, device="meta"), **inputs)
    assert [tuple(f.shape[1:]) for f in tape.features.values()] == [
        (2560, 8, 8),
        (1920, 16, 16),
        (960, 32, 32),
        (640, 64, 64),
    ]


def test_hyperfeatures_hold_10560_channels():
    preset = presets("hyperfeatures")
    assert sum(table("sd")[path].channels for path in preset.layers) == 10560
    assert (preset.where, preset.noise, len(preset.layers)) == ("residual", "clean", 12)


def test_ddpm_seg_holds_8448_channels():
    preset = presets("ddpm-seg")
    assert len(preset.timestep) * sum(table("adm-256")[path].channels for path in preset.layers) == 8448


def test_edm_grid():
    grid = [edm_sigma(i) for i in range(19)]
    expected = [0, 0.002, 0.0075, 0.0229, 0.0599, 0.1395, 0.2964, 0.5853, 1.088, 1.923]
    assert grid[:10] == pytest.approx(expected, rel=5e-3)
    assert grid[18] == pytest.approx(80)
    assert grid == sorted(grid)
    with pytest.raises(ValueError, match=r"0\.\.18"):
        edm_sigma(19)


def test_edm_level_under_edms_scheduler():
    level = Denoiser(build("ddim").unet, EDMEulerScheduler()).level(presets("ddae", "edm-ddpm-cifar10").timestep)
    sigma = edm_sigma(4)
    assert level.timestep == pytest.approx(torch.tensor(sigma).log().item() / 4, rel=1e-4)
    assert level.alpha == pytest.approx((sigma**2 + 0.25) ** -0.5, rel=1e-5)


@pytest.mark.parametrize("preset", [p for p in list_presets(family="sd")], ids=lambda p: p.method)
def test_arguments_make_an_extractor(preset):
    """The tiny network has the stages of the real one, so every preset runs on it, at a smaller size."""
    settings = {**preset.arguments(), "image_size": 32, "ensemble_size": min(preset.ensemble_size, 2)}
    extractor = FeatureExtractor(Denoiser.from_pipe(build("sd")), **settings)
    output = extractor(torch.rand(1, 3, 32, 32), prompt=preset.prompt)
    assert output.layers == list(preset.layers)


def test_a_preset_is_frozen_and_named():
    preset = presets("dift", "sd")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.timestep = 0
    assert all(p.source and "arXiv" in p.source and p.family in FAMILIES for p in list_presets())
    assert len({(p.method, p.family) for p in list_presets()}) == len(list_presets())
    assert isinstance(presets("ddpm-seg").arguments()["timestep"], list)


@pytest.mark.parametrize(
    ("method", "family", "message"),
    [
        ("dino", None, "No preset for method 'dino'. Methods: dift.*odise"),
        ("dift", None, "needs a family; it has 'sd', 'adm-256'"),
        ("dift", "flux", "no preset for family 'flux'; it has 'sd', 'adm-256'.*select_features"),
        ("gdc", "sd", "it has 'adm-256'"),
    ],
)
def test_unknown_presets(method, family, message):
    with pytest.raises(ValueError, match=message):
        presets(method, family)


def test_presets_of_vp_networks_are_training_timesteps():
    schedule = Denoiser(build("ddpm").unet, DDPMScheduler())
    for preset in list_presets():
        if not preset.family.startswith("edm"):
            for t in preset.timestep if isinstance(preset.timestep, tuple) else (preset.timestep,):
                assert schedule.level(t).timestep == t
