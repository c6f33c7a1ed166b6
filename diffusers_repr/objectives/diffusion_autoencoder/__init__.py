"""Diffusion autoencoders: an image to a code, and back by a denoiser that is told it."""

from diffusers_repr.objectives.diffusion_autoencoder.config import DiffusionAutoencoderConfig, PenaltyConfig
from diffusers_repr.objectives.diffusion_autoencoder.objective import DiffusionAutoencoderObjective
from diffusers_repr.objectives.diffusion_autoencoder.penalties import kl_divergence, mmd

__all__ = ["DiffusionAutoencoderConfig", "DiffusionAutoencoderObjective", "PenaltyConfig", "kl_divergence", "mmd"]
