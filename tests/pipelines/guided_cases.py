"""The published pipelines with guidance, the model of each, and a small call of it."""

import numpy as np
import torch

# Folder in `pipelines` -> (tiny model, class)
GUIDED = {
    "guided_stable_diffusion": ("sd", "GuidedStableDiffusionPipeline"),
    "guided_stable_diffusion_xl": ("sdxl", "GuidedStableDiffusionXLPipeline"),
    "guided_dit": ("dit", "GuidedDiTPipeline"),
    "guided_unconditional": ("class_unet", "GuidedUnconditionalPipeline"),
}
_CALLS = {
    "sd": {"prompt": "a cat", "height": 32, "width": 48, "guidance_scale": 3.0},
    "sdxl": {"prompt": "a cat", "height": 32, "width": 48, "guidance_scale": 3.0},
    "dit": {"class_labels": [207, 5], "guidance_scale": 3.0},
    "class_unet": {"class_labels": [2, 5], "guidance_scale": 3.0},
    "ddpm": {"batch_size": 2},
    "ddim": {"batch_size": 2},
}


def arguments(name: str) -> dict:
    """Arguments of a call with classifier-free guidance where the model has it."""
    return dict(_CALLS[name])


def run(pipe, seed: int = 0, **arguments) -> np.ndarray:
    """Images `(B, H, W, C)` of a few steps."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np", **arguments}
    return pipe(**settings, generator=torch.Generator().manual_seed(seed)).images
