"""One adapter a file; importing this registers ours."""

from diffusers_repr.denoiser.families import (
    dit,
    flux,
    joint_vit,
    pixart,
    sana,
    sd3,
    sit,
    unet2d,
    unet2d_condition,
)

__all__ = ["dit", "flux", "joint_vit", "pixart", "sana", "sd3", "sit", "unet2d", "unet2d_condition"]
