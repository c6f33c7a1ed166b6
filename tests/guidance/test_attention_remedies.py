"""What refuses attention tells only what works and leaves the unguided samples as they were."""

import warnings

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional

from diffusers_repr import PAG, SAG, Denoiser, guide
from diffusers_repr.capture.attention import capture_attention
from diffusers_repr.capture.hidden_softmax import softmax_remedy
from tests.guidance.test_families import FAMILIES, LAYERS, latents, lively
from tests.testers.families import network_of
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build

OTHERS = ("sd", "sdxl", "pixart", "sd3", "flux", "sana")


def samples(pipe, name, steps=2, size=None, **more):
    if name in FAMILIES:
        sides = {} if size is None else dict(zip(("num_frames", "height", "width")[-len(size) :], size, strict=True))
        return latents(pipe, name, **FAMILIES[name].off, **{"num_inference_steps": steps, **sides, **more})
    height, width = SIZES[name] if size is None else size
    binning = {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
    call = {"height": height, "width": width, "guidance_scale": 1.0, "output_type": "latent", **CONDITIONS[name]}
    call |= {"num_inference_steps": steps, "return_dict": False, **binning, **more}
    call |= {"clean_caption": False} if name in ("pixart", "sana") else {}
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def made(name):
    return lively(name) if name in FAMILIES else build(name)


FUSED = ("sd", "sd3", "flux", "hunyuan_dit", "aura_flow", "qwen_image")  # one for each way of fusing


@pytest.mark.parametrize(
    "name",
    [*FUSED, *(pytest.param(n, marks=pytest.mark.slow) for n in (*OTHERS, *LAYERS) if n not in FUSED)],
)
def test_fused_projections_change_nothing(name):
    pipe = made(name)
    network = network_of(pipe)
    if not hasattr(network, "fuse_qkv_projections"):
        pytest.skip("diffusers fuses none here")
    steps = 2 if name == "ltx" else 1  # its scheduler makes no single step
    plain = samples(pipe, name, steps)
    with guide(pipe, PAG(3.0)):
        wanted = samples(pipe, name, steps)
    network.fuse_qkv_projections()
    with guide(pipe, PAG(3.0)):
        found = samples(pipe, name, steps)
    assert (found - wanted).abs().max() <= 1e-3 * (wanted - plain).abs().max()
    assert (samples(pipe, name, steps) - plain).abs().max() <= 1e-5 * plain.abs().max()


class Reached(Exception):
    """The last of the layers was called."""


@pytest.mark.parametrize("name", [*OTHERS, *LAYERS])
def test_defaults_are_layers_of_the_image(name):
    """The layers that PAG takes by default see more tokens of a larger image, of the same text."""
    pipe, counts = made(name), []
    layers = Denoiser.from_pipe(pipe).default_layers("pag").layers

    def count(module, args, kwargs):
        counts.append(kwargs.get("hidden_states", args[0] if args else None).shape[1])
        if len(counts) % len(layers) == 0:
            raise Reached

    for path in layers:
        network_of(pipe).get_submodule(path).register_forward_pre_hook(count, with_kwargs=True)
    size = FAMILIES[name].size if name in FAMILIES else SIZES[name]
    for sides in (size, (*size[:-1], 2 * size[-1])):
        with pytest.raises(Reached):
            samples(pipe, name, 2, sides)
    half = len(layers)
    assert all(small < large for small, large in zip(counts[:half], counts[half:], strict=True))


def test_sag_names_layers_over_the_image_alone():
    """Lumina 2's blocks hold text too, its refiner of the noise does not: as the refusal says."""
    pipe = made("lumina2")
    plain = samples(pipe, "lumina2")
    with pytest.raises(ValueError, match=r"SAG is defined for.*Take one of \['noise_refiner.0.attn'\] by layers="):
        guide(pipe, SAG(1.0))
    with guide(pipe, SAG(1.0, layers="noise_refiner.0.attn")):
        assert not torch.equal(samples(pipe, "lumina2"), plain)
    assert torch.equal(samples(pipe, "lumina2"), plain)


def test_linear_attention():
    """SAG's refusal of Sana: PAG by values alone."""
    pipe = made("sana")
    with pytest.raises(ValueError, match="perturbation='identity' or 'drop' takes the values only"):
        guide(pipe, SAG(1.0))
    plain = samples(pipe, "sana", 1)
    for kind in ("identity", "drop"):
        with guide(pipe, PAG(3.0, perturbation=kind)):
            assert not torch.equal(samples(pipe, "sana", 1), plain)
    assert isinstance(pipe.transformer, SanaTransformer2DModel)
    pipe.transformer.transformer_blocks[1].attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="its values are known of SanaLinearAttnProcessor2_0 alone"):
        guide(pipe, PAG(3.0))


def test_a_backend_that_hides_its_softmax():
    """A processor of FLUX.2 under torch's flex attention: refused in its first step, and what is told works."""
    pipe = made("flux2")
    plain = samples(pipe, "flux2", 1)
    with guide(pipe, PAG(3.0)):
        wanted = samples(pipe, "flux2", 1)
    pipe.transformer.set_attention_backend("flex")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # torch's: it was not compiled
            pytest.raises(ValueError, match=r"made 0 calls.*call set_attention_backend\('native'\) on the network"),
            guide(pipe, PAG(3.0)),
        ):
            samples(pipe, "flux2", 1)
    finally:
        pipe.transformer.set_attention_backend("native")
    assert torch.equal(samples(pipe, "flux2", 1), plain)
    with guide(pipe, PAG(3.0)):
        assert torch.equal(samples(pipe, "flux2", 1), wanted)


PATH = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("hide", "remedy", "told"),
    [
        (lambda pipe: pipe.enable_attention_slicing(1), lambda pipe: pipe.disable_attention_slicing(), "slicing"),
        (
            lambda pipe: pipe.unet.set_default_attn_processor(),
            lambda pipe: pipe.unet.get_submodule(PATH).set_processor(AttnProcessor2_0()),
            "set_processor",
        ),
    ],
)
def test_attention_maps_of_hidden_softmax(hide, remedy, told):
    pipe = build("sd")
    plain = samples(pipe, "sd", 1)
    hide(pipe)
    with pytest.raises(ValueError, match=f"made no call of .*{told}"), capture_attention(pipe.unet, PATH):
        samples(pipe, "sd", 1)
    remedy(pipe)
    with capture_attention(pipe.unet, PATH) as tape:
        samples(pipe, "sd", 1)
    assert tape[PATH].sum(-1).allclose(torch.ones(()), atol=1e-5)
    assert (samples(pipe, "sd", 1) - plain).abs().max() < 1e-5


class Unknown(nn.Module):
    """Attention with a processor that no remedy is known for."""

    processor = type("Hidden", (), {})()


def test_no_advice_where_none_is_known():
    assert softmax_remedy(Unknown()) == ""
    pipe = lively("hunyuan_dit")
    attention = pipe.transformer.blocks[1].attn1
    assert softmax_remedy(attention) == ""  # by AttnProcessor2_0 its rotary positions would be lost
    upcast = build("sd").unet.get_submodule(PATH)
    upcast.set_processor(AttnProcessor())
    upcast.upcast_softmax = True
    assert softmax_remedy(upcast) == ""
    assert functional.scaled_dot_product_attention is not None
    assert set(OTHERS) < set(PIPELINES)
