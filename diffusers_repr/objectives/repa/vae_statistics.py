"""Mean and standard deviation of a VAE's latents: read from its config, and written into the VAE for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.objectives.artifacts import ModelArtifact
from diffusers_repr.objectives.repa.latent_norm import LatentNorm


def latent_statistics(vae: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of raw latents that the config of a VAE implies, numbers or one a channel."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor = config.get("scaling_factor") or 1.0
    if mean is not None and std is not None:
        return mean, torch.as_tensor(std) / factor
    return config.get("shift_factor") or 0.0, 1 / factor


@torch.no_grad()
def write_statistics(vae: Any, mean: Tensor, std: Tensor, pipeline: type) -> None:
    """Make the VAE give and take normalised latents `(z - mean) / std`, in place.

    A VAE with 1 x 1 convolutions around its latents takes the statistics into their weights, exactly, and every
    pipeline decodes rightly with `scaling_factor` 1. Others keep them as `latents_mean` and `latents_std`, which the
    pipelines of this package read.

    Args:
        vae: On the CPU.
        mean: `(C,)`, float64.
        std: `(C,)`, float64.
        pipeline: Class of the pipeline it goes into.

    Raises:
        TypeError: For a VAE without such convolutions in a pipeline of diffusers.
    """
    before, after = getattr(vae, "quant_conv", None), getattr(vae, "post_quant_conv", None)
    if before is not None and after is not None:
        weight, shift = _wide(after)
        after.weight.copy_(weight * std.view(1, -1, 1, 1))
        after.bias.copy_(shift + weight[:, :, 0, 0] @ mean)
        weight, shift = _wide(before)
        scale = torch.cat([1 / std, torch.ones_like(std)])  # the posterior's mean, and the log of its variance
        before.weight.copy_(weight * scale.view(-1, 1, 1, 1))
        before.bias.copy_(torch.cat([(shift[: len(mean)] - mean) / std, shift[len(mean) :] - 2 * std.log()]))
        vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
        return
    if pipeline.__module__.startswith("diffusers."):
        raise TypeError(
            f"{pipeline.__name__} reads no statistics of latents, and {type(vae).__name__} has no quant_conv to hold "
            "them. Train with SiTPipeline, or with a VAE that has use_quant_conv and use_post_quant_conv."
        )
    vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=mean.tolist(), latents_std=std.tolist())


@dataclass(frozen=True, kw_only=True)
class NormalizingVAE(ModelArtifact):
    """The VAE with the statistics of the latents in it.

    Attributes:
        norm: The statistics, which lie in the state as `latent_norm`.
        pipeline: Class of the pipeline it goes into.
    """

    norm: LatentNorm
    pipeline: type

    def build(self, state: Mapping[str, Tensor]) -> Any:
        """See `Artifact.build`.

        Raises:
            TypeError: If the pipeline cannot know of the statistics.
        """
        vae = super().build(state)
        mean, var = (state[f"latent_norm.{name}"].double() for name in ("mean", "var"))
        write_statistics(vae, mean, torch.sqrt(var + self.norm.eps), self.pipeline)
        return vae


def _wide(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight.double(), layer.bias.double()


__all__ = ["NormalizingVAE", "latent_statistics", "write_statistics"]
