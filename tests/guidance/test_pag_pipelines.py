"""PAG on the plain pipelines equals diffusers' own PAG pipelines at equal seeds."""

import inspect

import pytest
import torch
from diffusers import (
    ControlNetModel,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)

from diffusers_repr import PAG, guide
from tests.guidance.attention_cases import randomised
from tests.testers.cases import pairs, some
from tests.testers.models import CONDITIONS, SIZES, build

THEIRS = {
    "sd": StableDiffusionPAGPipeline,
    "sdxl": StableDiffusionXLPAGPipeline,
    "sd3": StableDiffusion3PAGPipeline,
    "pixart": PixArtSigmaPAGPipeline,
    "sana": SanaPAGPipeline,
}
# Theirs are regular expressions that match anywhere; ours are whole paths.
DEFAULT = {"sd": "mid", "sdxl": "mid", "sd3": "blocks.1", "pixart": "blocks.1", "sana": "blocks.1"}
SEVERAL = {
    "sd": (
        ["down_blocks.1", "mid", r"up_blocks.2.attentions.1"],
        ["down_blocks.1.*", "mid_block.*", "up_blocks.2.attentions.1.*"],
    ),
    "sdxl": (["down", "up_blocks.0.attentions.1"], ["down_blocks.*", "up_blocks.0.attentions.1.*"]),
    "sd3": (["blocks.(0|1)"], ["transformer_blocks.*"]),
    "pixart": (["blocks.0.", "blocks.1."], ["transformer_blocks.[01].attn1"]),
    "sana": (["blocks.0", "blocks.1"], "transformer_blocks.*.attn1"),
}
SCALES = [1.0, 4.0]
CALLS = {
    "pixart": {"use_resolution_binning": False},
    "sana": {"use_resolution_binning": False, "complex_human_instruction": None},
}


def of_parts(cls, pipe, **more):
    """A pipeline of another class with the same components."""
    accepted = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in accepted}
    other = cls(
        **parts, **({"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}), **more
    )
    other.set_progress_bar_config(disable=True)
    return other


def lively(pipe):
    """Larger weights in the attention, so that it matters."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    if "timestep_scale" in network.config:
        network.register_to_config(timestep_scale=1.0)  # which SanaPAGPipeline leaves out
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(part in name.split(".") for part in ("to_q", "to_k", "to_v", "to_out")) or ".add_" in name:
                parameter.copy_(parameter * 2 + 0.2 * torch.randn(parameter.shape, generator=draw))
    return pipe


def latents(pipe, name, guidance_scale, **more):
    call = {**CONDITIONS[name], **CALLS.get(name, {}), "guidance_scale": guidance_scale, "output_type": "latent"}
    if "image" not in more or "control" in type(pipe).__name__.lower():
        call.update(zip(("height", "width"), SIZES[name], strict=True))
    call = {"num_inference_steps": 3, **call, **more}
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def check(name, ours, theirs, guidance, guidance_scale, call=None, **pag):
    """Equal to theirs, and not the unguided samples."""
    expected = latents(theirs, name, guidance_scale, **(call or {}), **pag)
    unguided = latents(ours, name, guidance_scale, **(call or {}))
    with guide(ours, guidance) as handle:
        found = latents(ours, name, guidance_scale, **(call or {}))
    away = (unguided - expected).abs().max().item()
    off = (found - expected).abs().max().item()
    allowed = max(1e-4, 1e-5 * expected.abs().max().item())  # some latents here are of size 50 and more
    assert away > 30 * allowed
    assert off < allowed
    return handle


@pytest.mark.parametrize(
    ("name", "guidance_scale"),
    pairs(THEIRS, SCALES, ("sd", 1.0), ("sdxl", 4.0), ("sd3", 4.0), ("pixart", 1.0), ("sana", 4.0)),
)
def test_text_to_image(name, guidance_scale):
    theirs = of_parts(THEIRS[name], lively(build(name)), pag_applied_layers=DEFAULT[name])
    layers = "transformer_blocks.1.attn1" if name == "sana" else None  # whose middle is 0 of 2 by no publication
    handle = check(name, lively(build(name)), theirs, PAG(3.0, layers=layers), guidance_scale, pag_scale=3.0)
    lanes = 2 if guidance_scale == 1 else 3
    assert [(step.lanes, step.passes) for step in handle.stats.steps] == [(lanes, 1)] * handle.stats.calls


@pytest.mark.parametrize(("name", "guidance_scale"), pairs(THEIRS, SCALES, ("sd", 4.0), ("sd3", 1.0), ("pixart", 4.0)))
def test_several_layers(name, guidance_scale):
    regular, layers = SEVERAL[name]
    theirs = of_parts(THEIRS[name], lively(build(name)), pag_applied_layers=regular)
    check(name, lively(build(name)), theirs, PAG(2.0, layers=layers), guidance_scale, pag_scale=2.0)


@pytest.mark.parametrize("name", some(["sd", "sdxl", "sd3", "sana"], "sd", "sana"))
def test_adaptive_scale(name):
    """3 at the first timestep, less and less after: `max(0, 3 - a (1000 - t))`. Theirs fails for PixArt's batches."""
    layers = "transformer_blocks.1.attn1" if name == "sana" else None
    theirs = of_parts(THEIRS[name], lively(build(name)), pag_applied_layers=DEFAULT[name])
    config = PAG(3.0, adaptive=0.007, layers=layers)
    pag = {"pag_scale": 3.0, "pag_adaptive_scale": 0.007}
    handle = check(name, lively(build(name)), theirs, config, 4.0, **pag)
    acted = [bool(step.acted) for step in handle.stats.steps]
    assert acted[0]
    assert acted[-1] is (name == "sana")


@pytest.mark.parametrize("name", some(["sd", "sdxl"], "sd"))
def test_several_images_a_prompt(name):
    theirs = of_parts(THEIRS[name], lively(build(name)))
    call = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
    check(name, lively(build(name)), theirs, PAG(3.0), 4.0, call, pag_scale=3.0)


IMAGE = {
    "sd": (StableDiffusionImg2ImgPipeline, StableDiffusionPAGImg2ImgPipeline),
    "sdxl": (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPAGImg2ImgPipeline),
    "sd3": (StableDiffusion3Img2ImgPipeline, StableDiffusion3PAGImg2ImgPipeline),
}
MASKED = {
    "sd": (StableDiffusionInpaintPipeline, StableDiffusionPAGInpaintPipeline),
    "sdxl": (StableDiffusionXLInpaintPipeline, StableDiffusionXLPAGInpaintPipeline),
}


def picture(name, channels=3):
    return torch.rand(1, channels, *SIZES[name], generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "guidance_scale"), pairs(IMAGE, SCALES, ("sd", 4.0), ("sd3", 1.0)))
def test_image_to_image(name, guidance_scale):
    ours, theirs = (of_parts(cls, lively(build(name))) for cls in IMAGE[name])
    call = {"image": picture(name), "strength": 0.7, "num_inference_steps": 4}
    if name == "sd3":
        call |= {"height": SIZES[name][0], "width": SIZES[name][1]}
    handle = check(name, ours, theirs, PAG(3.0), guidance_scale, call, pag_scale=3.0)
    assert 1 < handle.stats.calls < 4


@pytest.mark.parametrize(("name", "guidance_scale"), pairs(MASKED, SCALES, ("sd", 4.0)))
def test_inpainting(name, guidance_scale):
    ours, theirs = (of_parts(cls, lively(build(name))) for cls in MASKED[name])
    call = {"image": picture(name), "mask_image": (picture(name, 1) > 0.5).float(), "strength": 1.0}
    call |= {"height": SIZES[name][0], "width": SIZES[name][1]}
    check(name, ours, theirs, PAG(3.0), guidance_scale, call, pag_scale=3.0)


@pytest.mark.parametrize(
    ("layers", "guidance_scale"), pairs(["mid", "down_blocks.1"], SCALES, ("mid", 1.0), ("down_blocks.1", 4.0))
)
def test_controlnet(layers, guidance_scale):
    """Its residuals are added between blocks: to the middle block's output, and to what the down blocks keep."""
    pipes = []
    for cls in (StableDiffusionControlNetPipeline, StableDiffusionControlNetPAGPipeline):
        pipe = lively(build("sd"))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            control = randomised(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)))
        more = {"pag_applied_layers": layers} if "PAG" in cls.__name__ else {}
        pipes.append(of_parts(cls, pipe, controlnet=control, **more))
    call = {"image": picture("sd"), "controlnet_conditioning_scale": 0.004}
    config = PAG(3.0, layers="mid_block.*" if layers == "mid" else "down_blocks.1.*")
    handle = check("sd", *pipes, config, guidance_scale, call, pag_scale=3.0)
    assert handle.stats.steps[0].joined == ("mid_block" if layers == "mid" else "")
    with guide(pipes[0], config):
        other = latents(pipes[0], "sd", guidance_scale, **{**call, "image": 1 - call["image"]})
        again = latents(pipes[0], "sd", guidance_scale, **call)
    assert (other - again).abs().max() > 1e-2
