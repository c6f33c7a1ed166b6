"""One adapter a file; importing this registers ours."""

from diffusers_repr.denoiser.families import (
    aura_flow,
    chroma,
    cogview4,
    dit,
    flux,
    hunyuan_dit,
    joint_vit,
    lumina2,
    pixart,
    sana,
    sd3,
    sit,
    unet2d,
    unet2d_condition,
)

__all__ = [
    "aura_flow",
    "chroma",
    "cogview4",
    "dit",
    "flux",
    "hunyuan_dit",
    "joint_vit",
    "lumina2",
    "pixart",
    "sana",
    "sd3",
    "sit",
    "unet2d",
    "unet2d_condition",
]
