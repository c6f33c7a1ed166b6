"""Which layers are perturbed: patterns, defaults of real architectures, what is refused; `describe`."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_repr import PAG, SAG, Denoiser, Family, describe, guide
from diffusers_repr.denoiser.attention_layouts import SINGLE_TEXT_FIRST
from tests.capture.models import hook_count
from tests.testers.models import PIPELINES, build


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def bound(target, **config):
    """The layers that a config acts on."""
    denoiser = target if isinstance(target, Denoiser) else Denoiser.from_pipe(target)
    return PAG(**config).bind(denoiser).layers


def deep_transformer(layers=14):
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return Denoiser(model, DDIMScheduler())


# Patterns


def test_patterns_are_anchored_at_both_ends():
    denoiser = deep_transformer()
    one = ("transformer_blocks.1.attn1",)
    assert bound(denoiser, layers="transformer_blocks.1.*") == one
    assert bound(denoiser, layers="transformer_blocks.1.attn1") == one
    assert bound(denoiser, layers="*blocks.1.*") == one
    assert len(bound(denoiser, layers="transformer_blocks.1?.attn1")) == 4
    assert len(bound(denoiser, layers="*")) == 14
    for pattern in ("blocks.1", "transformer_blocks.1.attn", "transformer_blocks.1.attn1.", "locks.1.attn1"):
        with pytest.raises(ValueError, match=r"matches nothing.*transformer_blocks"):
            bound(denoiser, layers=pattern)


def test_order_and_repetition_do_not_matter():
    denoiser = deep_transformer(4)
    given = ["transformer_blocks.3.attn1", "transformer_blocks.0.*", "transformer_blocks.[03].attn1"]
    assert bound(denoiser, layers=given) == ("transformer_blocks.0.attn1", "transformer_blocks.3.attn1")


BAD = {
    "unknown": ("no.such.layer", ValueError, r"'no.such.layer' of UNet2DConditionModel matches nothing.*attn1"),
    "nearly": (
        "mid_block.attentions.0.transformer_blocks.0.attn3",
        ValueError,
        r"matches nothing.*'mid_block.attentions.0.transformer_blocks.0.attn1'",
    ),
    "one of two": (["mid_block.*", "middle.*"], ValueError, "'middle.*' of UNet2DConditionModel matches nothing"),
    "cross-attention": (
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        ValueError,
        r"matches cross-attention only \(mid_block.*attn2\).*Self-attention: .*attn1",
    ),
    "cross-attentions": ("*attn2", ValueError, "matches cross-attention only"),
    "no attention": ("mid_block.resnets.0", ValueError, "is no attention module.*attn1"),
    "no attentions": ("*.conv?", ValueError, "is no attention module"),
    "of an attention": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
        ValueError,
        "is no attention module",
    ),
    "empty": ([], ValueError, r"No layers were given.*attn1"),
    "nothing": ("", ValueError, "matches nothing"),
    "number": (3, TypeError, r"full module path such as 'down_blocks.*got 3 \(int\)"),
    "numbers": ([0, 1], TypeError, r"got 0 \(int\)"),
    "one number": (["mid_block.*", 5], TypeError, r"got 5 \(int\)"),
    "none among them": (["mid_block.*", None], TypeError, r"got None \(NoneType\)"),
    "bytes": (b"mid_block.*", TypeError, r"\(bytes\)"),
    "dict": ({"mid_block.*": 1}, TypeError, r"\(dict\)"),
}


def test_layers_that_are_refused():
    pipe = build("sd")
    before, processors = dict(vars(pipe.scheduler)), list(pipe.unet.attn_processors.values())
    for layers, error, message in BAD.values():
        with pytest.raises(error, match=message):
            guide(pipe, PAG(3.0, layers=layers))
        assert hook_count(pipe.unet) == 0
        assert vars(pipe.scheduler) == before
        assert all(a is b for a, b in zip(pipe.unet.attn_processors.values(), processors, strict=True))
        guide(pipe, PAG(3.0)).remove()  # the pipeline is not taken for guided
    with guide(pipe, PAG(3.0)) as handle:
        pipe("a cat", height=32, width=32, num_inference_steps=1, output_type="latent")
    assert handle.stats.lanes == 3


def test_perturbations_that_are_refused():
    with pytest.raises(ValueError, match="perturbation='noise'; it is one of identity, drop, blur, mask"):
        PAG(perturbation="noise")
    for wrong in (3, None, object()):
        with pytest.raises(TypeError, match="perturbation"):
            PAG(perturbation=wrong)
    with pytest.raises(ValueError, match="linear attention.*values only"):
        guide(build("sana"), PAG(perturbation="blur"))


def test_a_network_without_self_attention():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, add_attention=False, **blocks)
    with pytest.raises(ValueError, match="no self-attention at the default place.*none in the whole network"):
        guide(Denoiser(unet, DDPMScheduler()), PAG(3.0))
    with pytest.raises(ValueError, match="matches nothing. The network has no self-attention that its family"):
        guide(Denoiser(unet, DDPMScheduler()), PAG(3.0, layers="mid_block.attentions.0"))


class Refined(nn.Module):
    """Text tokens attend to each other, then to the image's: both by diffusers' `Attention`."""

    def __init__(self):
        super().__init__()
        self.words, self.tower = nn.ModuleList(attentions(3)), nn.ModuleList(attentions(2))

    def forward(self, sample, timestep, text):
        for block in self.words:
            text = block(text)
        tokens = torch.cat([text, sample.flatten(2).transpose(1, 2)], dim=1)
        for block in self.tower:
            tokens = block(tokens)
        return (tokens[:, text.shape[1] :].transpose(1, 2).unflatten(2, sample.shape[2:]),)


def attentions(count):
    return [Attention(8, heads=2, dim_head=4) for _ in range(count)]


class Silent(Family):
    def channels(self):
        return 8


class Stacked(Silent):
    stacks = ("tower",)


class Told(Silent):
    attentions = {"tower.*": SINGLE_TEXT_FIRST}


def test_a_family_that_does_not_tell_what_is_image():
    """`words.2` is at half of the depth: no default by guess, but one where the family says which is of the image."""

    def of(family):
        return Denoiser(Refined(), DDPMScheduler(), family=family)

    message = r"Silent does not tell which attention of Refined.*layers=.*'words.0', 'words.1', '...', 'tower.0', 'tow"
    for method, config in (("PAG", PAG()), ("SAG", SAG())):
        with pytest.raises(ValueError, match=f"{message}.*") as raised:
            config.bind(of(Silent()))
        assert f"so {method} has no default there" in str(raised.value)
    assert [method.works for method in describe(of(Silent())).methods] == [True, False, False]
    assert bound(of(Silent()), layers="tower.*") == ("tower.0", "tower.1")
    assert bound(of(Stacked())) == bound(of(Told())) == ("tower.1",)


# Defaults

TINY = {
    "ddpm": ("mid_block.attentions.0",),
    "ddim": ("mid_block.attentions.0",),
    "class_unet": ("mid_block.attentions.0",),
    "sd": ("mid_block.attentions.0.transformer_blocks.0.attn1",),
    "sdxl": tuple(f"mid_block.attentions.0.transformer_blocks.{at}.attn1" for at in (0, 1)),
    "dit": ("transformer_blocks.1.attn1",),
    "pixart": ("transformer_blocks.1.attn1",),
    "sd3": ("transformer_blocks.1.attn",),
    "flux": ("single_transformer_blocks.0.attn",),
    "flux_guidance": ("single_transformer_blocks.0.attn",),
    "sana": ("transformer_blocks.1.attn1",),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_defaults_of_tiny_pipelines(name):
    pipe = build(name)
    assert bound(pipe) == TINY[name]
    found = describe(pipe)
    methods = {method.name: method for method in found.methods}
    assert found.model == type(network_of(pipe)).__name__
    assert methods["PAG"].layers == TINY[name]
    assert methods["PAG"].scale == PAG().scale == 3.0
    assert methods["PAG"].works
    assert set(TINY[name]) <= set(found.self_attentions)
    joint = name in ("sd3", "flux", "flux_guidance", "sana")
    assert methods["SAG"].works is not joint
    text = str(found)
    assert text.startswith(f"{found.model}: {len(found.self_attentions)} self-attention layers\n")
    assert all(path in text for path in TINY[name])
    assert "PAG       scale=3  " in text
    assert hook_count(network_of(pipe)) == 0


def adm():
    """ImageNet 256 of guided-diffusion, unconditional; attention at 32, 16 and 8 pixels."""
    return UNet2DModel(
        sample_size=256,
        in_channels=3,
        out_channels=6,
        block_out_channels=(256, 256, 512, 512, 1024, 1024),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
    )


def stable_diffusion():
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl():
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def dit_xl():
    return DiTTransformer2DModel(attention_head_dim=72, in_channels=4, out_channels=8, sample_size=32)


def pixart_sigma():
    return PixArtTransformer2DModel(sample_size=128, interpolation_scale=2, use_additional_conditions=False)


def sd3_medium():
    sizes = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    return SD3Transformer2DModel(sample_size=128, num_layers=24, joint_attention_dim=4096, **sizes)


def sd35_medium():
    sizes = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    second = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
    return SD3Transformer2DModel(sample_size=128, num_layers=24, joint_attention_dim=4096, **sizes, **second)


MID = "mid_block.attentions.0.transformer_blocks"
REAL = {  # builder, self-attention layers in all, PAG's, SAG's
    "adm 256": (
        adm,
        16,
        (
            "down_blocks.4.attentions.1",
            "down_blocks.5.attentions.0",
            "down_blocks.5.attentions.1",
            "mid_block.attentions.0",
        ),
        "up_blocks.0.attentions.2",
    ),
    "sd 1.5": (stable_diffusion, 16, (f"{MID}.0.attn1",), f"{MID}.0.attn1"),
    "sdxl": (sdxl, 70, tuple(f"{MID}.{at}.attn1" for at in range(10)), f"{MID}.0.attn1"),
    "dit xl": (dit_xl, 28, ("transformer_blocks.14.attn1",), "transformer_blocks.14.attn1"),
    "pixart sigma": (pixart_sigma, 28, ("transformer_blocks.1.attn1",), "transformer_blocks.14.attn1"),
    "sd3": (sd3_medium, 24, ("transformer_blocks.1.attn",), None),
    "sd3.5": (sd35_medium, 37, ("transformer_blocks.1.attn", "transformer_blocks.1.attn2"), None),
    "flux": (lambda: FluxTransformer2DModel(), 57, ("single_transformer_blocks.9.attn",), None),
}


@pytest.mark.parametrize("name", REAL)
def test_defaults_of_real_architectures(name):
    builder, count, pag, sag = REAL[name]
    with torch.device("meta"):
        model = builder()
    flow = isinstance(model, SD3Transformer2DModel | FluxTransformer2DModel)
    found = describe(Denoiser(model, FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()))
    methods = {method.name: method for method in found.methods}
    assert len(found.self_attentions) == count
    assert methods["PAG"].works
    assert methods["PAG"].layers == pag
    assert methods["SAG"].works is (sag is not None)
    assert methods["SAG"].layers == (() if sag is None else (sag,))


def test_describe_tells_where_defaults_come_from():
    text = str(describe(build("sd")))
    assert "Stable Diffusion setting and diffusers' default" in text
    assert "diffusers' Stable Diffusion SAG pipeline" in text
    assert "no published default (ours)" in str(describe(build("dit")))
    assert "joint attention" in str(describe(build("sd3")))
    with pytest.raises(TypeError, match="pipeline or a Denoiser"):
        describe(build("sd").unet)


def test_describe_where_the_default_does_not_exist():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, add_attention=False, **blocks)
    found = describe(Denoiser(unet, DDPMScheduler()))
    assert found.self_attentions == ()
    assert [method.works for method in found.methods] == [True, False, False]
    assert "none in the whole network" in str(found)
