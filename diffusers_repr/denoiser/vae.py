"""Encoding and decoding by any diffusers autoencoder: scale, shift, dtype and finiteness in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def vae_stride(vae: Any) -> int:
    """Pixels per latent pixel along one side."""
    return config_stride(vae.config)


def config_stride(config: Mapping[str, Any]) -> int:
    """As `vae_stride`, from the autoencoder's config alone."""
    if config.get("spatial_compression_ratio") is not None:
        return int(config["spatial_compression_ratio"])
    # AutoencoderDC and AutoencoderTiny tell encoder and decoder apart.
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(stages) - 1)


def encode_latents(
    vae: Any, pixels: Tensor, sample: bool = False, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Pixels `(B, 3, H, W)` in [-1, 1] to scaled latents `(B, C, h, w)`.

    Args:
        vae: An autoencoder of diffusers.
        pixels: On the VAE's execution device.
        sample: Draw from the posterior instead of taking its mean.
        generator: For `sample`; one, or one per image, on the CPU or the VAE's device.

    Raises:
        FloatingPointError: If the encoder gives NaN or infinity; names the VAE and its dtype.
    """
    with _encoding_dtype(vae) as dtype, torch.no_grad():
        out = vae.encode(pixels.to(dtype))
    if hasattr(out, "latent_dist"):
        latents = out.latent_dist.sample(generator=generator) if sample else out.latent_dist.mode()
    elif sample:
        raise ValueError(f"{type(vae).__name__} has no posterior to sample from; use its deterministic code.")
    else:
        latents = out.latent if hasattr(out, "latent") else out.latents
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError(
            f"The VAE ({type(vae).__name__}, {dtype}) gave NaN or infinite latents. Load it in float32 or bfloat16, "
            "or set force_upcast in its config."
        )
    return scale_latents(vae, latents)


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """A VAE's raw latents `(B, C, h, w)` as the network takes them: shifted and scaled as its config says."""
    mean, std = _statistics(vae, latents)
    factor, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    if mean is not None and std is not None:
        return (latents - mean) * factor / std
    return (latents - shift) * factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents `(B, C, h, w)` to pixels `(B, 3, H, W)`, about [-1, 1]."""
    mean, std = _statistics(vae, latents)
    factor, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    latents = latents * std / factor + mean if mean is not None and std is not None else latents / factor + shift
    with _encoding_dtype(vae) as dtype, torch.no_grad():
        return vae.decode(latents.to(dtype)).sample


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-channel latent mean and std, where the VAE's config has them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, None
    first, second = (torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for v in (mean, std))
    return first, second


@contextmanager
def _encoding_dtype(vae: Any) -> Iterator[torch.dtype]:
    """float32 weights while a VAE that overflows in half precision works; its own dtype again after."""
    dtype = vae.dtype
    if not (vae.config.get("force_upcast") and dtype == torch.float16):
        yield dtype
        return
    vae.to(dtype=torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype=dtype)
