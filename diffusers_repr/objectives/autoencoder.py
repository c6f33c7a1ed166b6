"""`AutoencoderObjective`: a small VAE of images, whose latents have mean 0 and standard deviation 1."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.objectives.artifacts import Artifact
from diffusers_repr.objectives.auxiliary.base import full_precision, widen
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.repa.latent_norm import LatentNorm
from diffusers_repr.objectives.repa.vae_statistics import NormalizingVAE


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The VAE and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of the VAE is unknown, or the weight is negative.
    """

    model: dict | str | None = setting(None, "arguments of AutoencoderKL, a mapping (JSON in a flag)")
    kl_weight: float = setting(1e-6, "of the KL divergence, summed over a latent, from the standard normal")
    initial_std: float = setting(0.05, "noise of the latents before the first step; a new VAE's own is about 1")

    def __post_init__(self) -> None:
        arguments = json_mapping("model", self.model)
        check_keys("`model`", arguments, inspect.signature(AutoencoderKL.__init__).parameters)
        if arguments.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images.")
        if not arguments.get("use_quant_conv", True) or not arguments.get("use_post_quant_conv", True):
            raise ValueError("`model` needs `use_quant_conv` and `use_post_quant_conv`: they hold the latents' scale.")
        if self.kl_weight < 0 or self.initial_std <= 0:
            raise ValueError(
                f"`kl_weight` is 0 or more, `initial_std` above 0; got {self.kl_weight}, {self.initial_std}."
            )
        object.__setattr__(self, "model", arguments)


def new_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """A VAE with random weights; noise as large as its means would hide the images from the decoder for long."""
    vae = AutoencoderKL(**json_mapping("model", config.model))
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = 2 * math.log(config.initial_std)
    return vae


class AutoencoderObjective(Objective):
    """`L1 + kl_weight KL` of an `AutoencoderKL` (Kingma and Welling 2014; Rombach et al. 2022, appendix G).

    Without the perceptual and the adversarial loss of the latter: for small or plain images. What is saved gives and
    takes latents of mean 0 and standard deviation 1, exactly the trained ones scaled, with `scaling_factor` 1.

    Args:
        vae: With `quant_conv` and `post_quant_conv`.
        kl_weight: Of the KL divergence, summed over a latent.
    """

    card = {"kind": "`AutoencoderKL`", "library_name": "diffusers", "pipeline_tag": None, "tags": ["diffusers", "vae"]}

    def __init__(self, vae: Any, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae.requires_grad_(True), kl_weight
        self.latent_norm = LatentNorm(vae.config.latent_channels, momentum=0.01)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, `reconstruction` (the mean absolute error in [-1, 1]) and `kl`."""
        images = batch["pixel_values"]
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(generator=batch.get("generator"))
        reconstruction = self.vae.decode(latents).sample
        self.latent_norm(latents.detach())  # its averages alone
        with full_precision(images.device):
            losses = {
                "reconstruction": F.l1_loss(widen(reconstruction), widen(images)),
                "kl": widen(posterior.kl()).mean(),
            }
        return weighted_sum(losses, {"kl": self.kl_weight})

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Images must be there, not cached latents."""
        if batch.get("pixel_values") is None:
            raise ValueError("A VAE is trained on images; train on pixel_values, not on cached latents.")

    def identity(self) -> dict[str, Any]:
        """The weight of the KL divergence."""
        return {"kl_weight": self.kl_weight}

    def ema_modules(self) -> dict[str, nn.Module]:
        """The VAE, and the statistics of its latents."""
        return {**super().ema_modules(), "latent_norm": self.latent_norm}

    def artifacts(self) -> list[Artifact]:
        """The VAE as a folder of diffusers."""
        pipeline = named_pipeline("StableDiffusionPipeline")
        return [NormalizingVAE(self.vae, "vae", norm=self.latent_norm, pipeline=pipeline)]


__all__ = ["AutoencoderConfig", "AutoencoderObjective", "new_autoencoder"]
