"""PAG on the further families: as a plain loop of two lanes, and as diffusers' own where it has it."""

import math

import pytest
import torch

from diffusers_repr import PAG, guide
from diffusers_repr.denoiser import Denoiser
from tests.testers.families import two_lanes
from tests.testers.models_text import FAMILIES, family_pipeline

# Attention modules, whether the image stands last in their softmax, and which rows of a guided call are conditional.
LAYERS = {
    "hunyuan_dit": (["blocks.1.attn1", "blocks.3.attn1"], True, "second"),
    "aura_flow": (["joint_transformer_blocks.1.attn", "single_transformer_blocks.0.attn"], True, "second"),
    "lumina2": (["noise_refiner.0.attn", "layers.1.attn"], True, "call"),
    "cogview4": (["transformer_blocks.1.attn1"], True, "call"),
    "chroma": (["transformer_blocks.1.attn", "single_transformer_blocks.1.attn"], True, "call"),
    "qwen_image": (["transformer_blocks.1.attn"], True, "call"),
    "hunyuan_image": (["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"], False, "call"),
    "flux2": (["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"], True, "call"),
    "z_image": (["noise_refiner.0.attention", "layers.1.attention"], False, "first"),
}


def lively(name):
    """With larger attention weights, so that it matters."""
    pipe = family_pipeline(name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in (getattr(pipe, "unet", None) or pipe.transformer).named_parameters():
            if any(part in path for part in ("to_q", "to_k", "to_v", "to_out", ".add_", "to_qkv")):
                parameter.copy_(parameter * 2 + 0.1 * torch.randn(parameter.shape, generator=draw))
    return pipe


def latents(pipe, name, **more):
    case = FAMILIES[name]
    height, width = case.size
    call = {"num_inference_steps": 2, "output_type": "latent", "height": height, "width": width, **case.call, **more}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def image_tokens(name):
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    return math.prod(side // denoiser.stride // denoiser.family.multiple() for side in FAMILIES[name].size)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_as_a_plain_loop_of_two_lanes(name, guided):
    case, (paths, last, cond) = FAMILIES[name], LAYERS[name]
    call = {**case.guided, **case.null} if guided else case.off
    if guided and name == "flux2":
        pytest.skip("its guidance is distilled: an input")
    ours, theirs = lively(name), lively(name)
    if name == "hunyuan_image":
        for pipe in (ours, theirs):
            pipe.guider._enabled = guided
    plain = latents(ours, name, **call)
    two_lanes(theirs, 3.0, paths, image_tokens(name), last, cond if guided else "call")
    wanted = latents(theirs, name, **call)
    with guide(ours, PAG(3.0, layers=paths)) as handle:
        found = latents(ours, name, **call)
    assert (plain - wanted).abs().max() > 1e-3
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert handle.stats.calls == (4 if guided and cond == "call" else 2)
    assert torch.equal(latents(ours, name, **call), plain)
