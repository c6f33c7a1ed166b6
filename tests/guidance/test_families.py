"""PAG on the further families: as a plain loop of two lanes, and as diffusers' own where it has it."""

import math

import pytest
import torch
from diffusers import HunyuanDiTPAGPipeline

from diffusers_repr import CFG, PAG, SAG, EnergyGuidance, guide
from diffusers_repr.denoiser import Denoiser
from tests.guidance.test_pag_pipelines import of_parts
from tests.testers.families import network_calls, network_of, sides, two_lanes
from tests.testers.family_cases import embeds
from tests.testers.hosts import newer
from tests.testers.models_text import FAMILIES, family_pipeline, kolors_class
from tests.testers.models_video import VIDEOS

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
    "wan": (["blocks.0.attn1", "blocks.2.attn1"], True, "call"),
    "ltx": (["transformer_blocks.1.attn1"], True, "second"),
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
    call = {"num_inference_steps": 2, "output_type": "latent", **sides(case.size), **case.call, **more}
    return pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]


def image_tokens(name):
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    *frames, h, w = denoiser.latent_size(FAMILIES[name].size)
    return math.prod([*frames, h // denoiser.family.multiple(), w // denoiser.family.multiple()])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_as_a_plain_loop_of_two_lanes(name, guided):
    case, (paths, last, cond) = FAMILIES[name], LAYERS[name]
    call = {**case.guided, **case.null} if guided else case.off
    ours, theirs = lively(name), lively(name)
    if guided and name == "flux2":  # whose guidance is distilled, FLUX.2 klein's is not
        ours, theirs = (of_parts(newer("diffusers", "Flux2KleinPipeline"), pipe) for pipe in (ours, theirs))
        call = {"guidance_scale": 4.0, "negative_prompt_embeds": embeds(1, 12, 24, seed=2)}
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


# HunyuanDiTPAGPipeline itself fails without classifier-free guidance: its sizes have a row too many.
@pytest.mark.parametrize(("name", "guidance_scale"), [("hunyuan_dit", 4.0), ("kolors", 1.0), ("kolors", 4.0)])
def test_as_diffusers_own(name, guidance_scale):
    """At our default layers, which are theirs."""
    kolors = kolors_class("pag.pipeline_pag_kolors", "KolorsPAGPipeline")
    cls = {"hunyuan_dit": HunyuanDiTPAGPipeline, "kolors": kolors}[name]
    theirs, ours = of_parts(cls, lively(name)), lively(name)
    binning = {"use_resolution_binning": False} if name == "hunyuan_dit" else {}
    call = {"guidance_scale": guidance_scale, **(FAMILIES[name].null if guidance_scale > 1 else {}), **binning}
    wanted = latents(theirs, name, **call, pag_scale=3.0)
    assert (latents(ours, name, **call) - wanted).abs().max() > 1e-3
    with guide(ours, PAG(3.0)):
        found = latents(ours, name, **call)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_captions_of_unequal_lengths():
    """Lumina 2 puts the image behind each row's own caption: two prompts in a batch are what each is alone."""
    pipe = lively("lumina2")
    start = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    call = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 96}
    prompts = ["a cat", "a photo of a cat on a sofa"]
    with guide(pipe, PAG(3.0, layers="layers.1.attn")):
        both = pipe(prompts, latents=start, **call).images
        alone = [pipe(prompt, latents=start[at : at + 1], **call).images for at, prompt in enumerate(prompts)]
    assert (both - torch.cat(alone)).abs().max() < 1e-4
    assert (both - pipe(prompts, latents=start, **call).images).abs().max() > 1e-3


def test_cfg_of_ours_replaces_a_renormalised_one():
    """`CFG` makes what the scheduler is given: the plain combination, in the scheduler's own sign and layout."""
    for name, scale in (("lumina2", {"guidance_scale": 4.0}), ("qwen_image", {"true_cfg_scale": 4.0})):
        pipe = lively(name)
        calls, steps = network_calls(
            pipe, {**FAMILIES[name].call, **FAMILIES[name].null, **scale}, FAMILIES[name].size
        )
        outs = [network_of(pipe)(**call, return_dict=False)[0].detach() for call in calls]
        combined = outs[1] + 4.0 * (outs[0] - outs[1])
        wanted = -combined if name == "lumina2" else combined
        assert (steps[0]["model_output"] - wanted).abs().max() > 1e-3  # the pipeline renormalises
        with guide(pipe, CFG(4.0)):
            _, steps = network_calls(
                pipe, {**FAMILIES[name].call, **FAMILIES[name].null, **scale}, FAMILIES[name].size
            )
        sigmas = steps[0]["scheduler"].sigmas
        stepped = steps[0]["sample"] + (sigmas[1] - sigmas[0]) * wanted
        assert (steps[0]["result"] - stepped).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"hunyuan_dit", *VIDEOS}))
def test_sag_refuses_where_text_is_in_the_softmax(name):
    with pytest.raises(ValueError, match=r"image tokens attend to text in the same softmax.*PAG"):
        guide(lively(name), SAG(0.75))


def test_sag_over_the_image_alone():
    pipe = lively("hunyuan_dit")
    plain = latents(pipe, "hunyuan_dit", **FAMILIES["hunyuan_dit"].off)
    with guide(pipe, SAG(0.75)):
        found = latents(pipe, "hunyuan_dit", **FAMILIES["hunyuan_dit"].off)
    assert (found - plain).abs().max() > 1e-3


def dark(features, x0, condition):
    return 100 * x0.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("update", "scale"), [("eps", 5.0), ("latent_sign", 0.3)])
@pytest.mark.parametrize("name", ["chroma", "lumina2", "z_image"])
def test_an_energy_pulls_the_right_way(name, update, scale):
    """Down, for packed latents and where the network's velocity has the other sign: prediction and latents alike."""
    pipe, call = lively(name), {**FAMILIES[name].off, "num_inference_steps": 3}  # pure noise, one between, maybe 0
    plain = latents(pipe, name, **call)
    with guide(pipe, EnergyGuidance(dark, x0=True, scale=scale, update=update)):
        found = latents(pipe, name, **call)
    assert found.mean() < plain.mean() - 0.1
