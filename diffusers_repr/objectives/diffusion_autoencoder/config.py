"""Settings of a diffusion autoencoder: its networks, what is trained of them, and its loss."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_repr.config.recipe import json_mapping, setting, take_arguments
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.models.semantic_encoder import SemanticEncoder


@dataclasses.dataclass(frozen=True)
class PenaltyConfig:
    """What the loss has beside the denoising error, and how this is weighted.

    Raises:
        ValueError: If a number is out of range, or set where it does nothing.
    """

    penalty: Literal["none", "mmd", "kl"] = setting("none", "that keeps the codes near the standard normal")
    penalty_weight: float = setting(1.0, "of the penalty")
    mmd_kernel: Literal["imq", "rbf"] = setting("imq", "of the MMD: inverse multiquadric or Gaussian")
    kl_capacity: float | None = setting(None, "C of |KL - C|, in nats; default: the divergence itself")
    weighting: Literal["uniform", "snr"] = setting("uniform", "of the levels: equal, or SNR^gamma / (1 + SNR)")
    snr_gamma: float = setting(0.1, "gamma of that weight")

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.penalty_weight < 0 or not 0 <= self.snr_gamma <= 1:
            raise ValueError(
                f"`penalty_weight` is 0 or more, `snr_gamma` from 0 to 1; got {self.penalty_weight}, {self.snr_gamma}."
            )
        if self.kl_capacity is not None and (self.penalty != "kl" or self.kl_capacity < 0):
            raise ValueError(
                f"`kl_capacity` is 0 or more, of `penalty: kl`; got {self.kl_capacity} of `penalty: {self.penalty}`."
            )


_ALLOWED = {"penalty": ("none", "mmd", "kl"), "mmd_kernel": ("imq", "rbf"), "weighting": ("uniform", "snr")}


@dataclasses.dataclass(frozen=True)
class DiffusionAutoencoderConfig(PenaltyConfig):
    """The networks of a diffusion autoencoder, and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: For arguments that a network does not have or that are missing, and settings that do not go
            together.
    """

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id of a base; none: a new U-Net")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    frozen_base: bool = setting(False, "keep the base, and train a gradient network beside it (PDAE)")
    model: dict | str | None = setting(None, "arguments of a new UNet2DModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = setting(None, "arguments of its DDPMScheduler")
    encoder: dict | str | None = setting(None, "arguments of SemanticEncoder, but for its channels")
    modulation: Literal["scale", "scale_shift"] = setting("scale_shift", "what the code does to the decoder's blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        take_arguments(self, model=UNet2DModel, scheduler=DDPMScheduler, encoder=SemanticEncoder)
        own = sorted({"in_channels", "variational"} & json_mapping("encoder", self.encoder).keys())
        if own:
            raise ValueError(f"`encoder` has its {', '.join(own)} by the images and the penalty; leave them out.")
        if self.modulation not in ("scale", "scale_shift"):
            raise ValueError(f"`modulation` is one of scale, scale_shift; got {self.modulation!r}.")
        based = self.pretrained_model_name_or_path is not None
        if based and (self.model or self.scheduler):
            raise ValueError("`pretrained_model_name_or_path` brings its own model and scheduler; drop them.")
        if not based and json_mapping("model", self.model).get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images; or name a base.")
        if self.frozen_base and not based:
            raise ValueError("`frozen_base` keeps a base as it is; name one by `pretrained_model_name_or_path`.")

    def load_denoiser(self) -> Denoiser:
        """The base, or a new U-Net with its noise process."""
        if self.pretrained_model_name_or_path is not None:
            base = self.pretrained_model_name_or_path
            return Denoiser.from_pretrained(base, revision=self.revision, dtype=torch.float32)
        unet = UNet2DModel(**json_mapping("model", self.model))
        scheduler = DDPMScheduler(**json_mapping("scheduler", self.scheduler))
        return Denoiser.from_pipe(named_pipeline("DDPMPipeline")(unet, scheduler))

    def new_encoder(self, channels: int, size: tuple[int, int]) -> SemanticEncoder:
        """An encoder with random weights.

        Args:
            channels: Of the images.
            size: (H, W) of the images.
        """
        side: Any = size[0] if size[0] == size[1] else size
        own = {"sample_size": side, **json_mapping("encoder", self.encoder)}
        return SemanticEncoder(**own, in_channels=channels, variational=self.penalty == "kl")


__all__ = ["DiffusionAutoencoderConfig", "PenaltyConfig"]
