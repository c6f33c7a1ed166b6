"""What a noisy classifier takes over from a diffusion pipeline: its noise process and, if it is latent, its VAE."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_repr import Denoiser, NoiseSchedule
from diffusers_repr.models import describe_process


@dataclasses.dataclass(frozen=True)
class Base:
    """A pipeline without its network, at one size of images."""

    name: str
    hub_id: str | None
    schedule: NoiseSchedule
    channels: int  # of x_0
    image_channels: int
    image_size: tuple[int, int]  # H, W
    stride: int  # pixels per x_0 pixel
    vae: torch.nn.Module | None

    @classmethod
    def load(cls, path: str, revision: str | None = None, resolution: int | None = None) -> "Base":
        """From a folder or a Hub id; images of the pipeline's own size, or of the side `resolution`."""
        denoiser = Denoiser.from_pretrained(path, revision=revision)
        size = (resolution, resolution) if resolution else denoiser.image_size
        denoiser.check_size(size)
        local, channels = Path(path).is_dir(), denoiser.family.channels()
        name, hub_id = (Path(path).resolve().name, None) if local else (path, path)
        return cls(name, hub_id, denoiser.schedule, channels, denoiser.image_channels, size, denoiser.stride,
                   denoiser.vae)  # fmt: skip

    def config(self) -> dict[str, Any]:
        """What a classifier's config keeps of it."""
        height, width = (side // self.stride for side in self.image_size)
        return describe_process(self.schedule) | {
            "in_channels": self.channels,
            "sample_size": height if height == width else [height, width],
            "base_model": self.name,
            "latent_scale": None if self.vae is None else self.vae.config.get("scaling_factor") or 1.0,
        }


def timesteps_at(schedule: NoiseSchedule, places: Tensor) -> Tensor:
    """Places in [0, 1], least noise first, to timesteps: whole ones of a table, VE's by their logarithm."""
    low, high = schedule.timestep_range
    if schedule.kind == "vp":
        return (places * schedule.num_train_timesteps).floor().clamp(low, high)
    if schedule.kind == "ve":
        return (low * (high / low) ** places).clamp(low, high)
    return (low + (high - low) * places).clamp(low, high)
