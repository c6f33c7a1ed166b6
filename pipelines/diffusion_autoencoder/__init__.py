"""Diffusion autoencoders."""

from diffusers_repr.pipelines.diffusion_autoencoder.pipeline import (
    DiffusionAutoencoderCode,
    DiffusionAutoencoderOutput,
    DiffusionAutoencoderPipeline,
)

__all__ = ["DiffusionAutoencoderCode", "DiffusionAutoencoderOutput", "DiffusionAutoencoderPipeline"]
