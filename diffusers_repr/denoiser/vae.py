"""Encoding and decoding by any diffusers autoencoder: scale, shift, dtype and finiteness in one place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

# For casting the weights of an autoencoder, which all threads share.
_CASTING = threading.RLock()


def vae_stride(vae: Any) -> int:
    """Pixels per latent pixel along one side."""
    return config_stride(vae.config)


def config_stride(config: Mapping[str, Any]) -> int:
    """As `vae_stride`, from the autoencoder's config alone."""
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if config.get(name) is not None:
            return int(config[name])
    if "spatio_temporal_scaling" in config:  # LTX
        return int(config["patch_size"]) * 2 ** sum(config["spatio_temporal_scaling"])
    if _takes_frames(config):
        return 2 ** len(config["temperal_downsample"])
    # AutoencoderDC and AutoencoderTiny tell encoder and decoder apart.
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(stages) - 1)


def pixel_channels(config: Mapping[str, Any]) -> int:
    """Channels of the images that an autoencoder takes, from its config."""
    channels = int(config.get("in_channels", 3))
    # Wan 2.2's counts those of a patch of pixels, LTX's those of a pixel.
    patch = config.get("patch_size") if "scale_factor_spatial" in config else None
    return channels // int(patch or 1) ** 2


def frame_stride(config: Mapping[str, Any]) -> int:
    """Frames per latent frame behind the first, which is one by itself, from the autoencoder's config."""
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        if config.get(name) is not None:
            return int(config[name])
    if "spatio_temporal_scaling" in config:  # LTX
        return int(config["patch_size_t"]) * 2 ** sum(config["spatio_temporal_scaling"])
    return 2 ** sum(config.get("temperal_downsample") or ())


def encode_latents(
    vae: Any, pixels: Tensor, sample: bool = False, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Pixels `(B, 3, H, W)` in [-1, 1] to scaled latents `(B, C, h, w)`; of a video with its frames before H and h.

    Args:
        vae: An autoencoder of diffusers.
        pixels: On the VAE's execution device.
        sample: Draw from the posterior instead of taking its mean.
        generator: For `sample`; one, or one per image, on the CPU or the VAE's device.

    Raises:
        FloatingPointError: If the encoder gives NaN or infinity; names the VAE and its dtype.
    """
    out, dtype = _encode(vae, pixels)
    if hasattr(out, "latent_dist"):
        latents = out.latent_dist.sample(generator=generator) if sample else out.latent_dist.mode()
    elif sample:
        raise ValueError(f"{type(vae).__name__} has no posterior to sample from; use its deterministic code.")
    else:
        latents = _code(out)
    latents = latents.squeeze(2) if pixels.ndim == 4 and _takes_frames(vae.config) else latents
    _check_finite(vae, dtype, latents)
    return scale_latents(vae, latents)


def has_posterior(vae: Any) -> bool:
    """Whether an autoencoder gives a distribution to draw latents from; some have one deterministic code."""
    return type(vae).__name__ not in ("AutoencoderDC", "AutoencoderTiny", "VQModel")


def encode_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels `(B, 3, H, W)` in [-1, 1] to the posterior's `cat[mean, std]`, `(B, 2C, h, w)` float32, unscaled.

    The std of an autoencoder without a posterior is 0. `draw_latents` makes latents of them.

    Args:
        vae: An autoencoder of diffusers.
        pixels: On the VAE's execution device.

    Raises:
        FloatingPointError: As `encode_latents`.
    """
    out, dtype = _encode(vae, pixels)
    mean = out.latent_dist.mean if hasattr(out, "latent_dist") else _code(out)
    std = out.latent_dist.std if hasattr(out, "latent_dist") else torch.zeros_like(mean)
    moments = torch.cat([mean.float(), std.float()], dim=1)
    moments = moments.squeeze(2) if _takes_frames(vae.config) else moments
    _check_finite(vae, dtype, moments)
    return moments


def draw_latents(
    moments: Tensor, vae: Any, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Scaled latents `(B, C, h, w)` float32, drawn from moments `(B, 2C, h, w)` of `encode_moments`.

    `mean + std n` with n standard normal, then scaled and shifted as the VAE's config says: what `encode_latents`
    with `sample=True` gives, with the same draw.

    Args:
        moments: Of any dtype; the arithmetic is float32.
        vae: For its scale and shift.
        generator: One, or one per image, on the CPU or the device of the moments; None: torch's global one.
    """
    mean, std = moments.float().chunk(2, dim=1)
    noise = randn_tensor(mean.shape, generator=generator, device=mean.device)
    return scale_latents(vae, mean + std * noise)


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """A VAE's raw latents `(B, C, h, w)` as the network takes them: shifted and scaled as its config says."""
    mean, std = _statistics(vae, latents)
    factor, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    if mean is not None and std is not None:
        return (latents - mean) * factor / std
    return (latents - shift) * factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents `(B, C, h, w)` to pixels `(B, 3, H, W)`, about [-1, 1]; of a video with its frames.

    An autoencoder that takes part in the denoising (LTX's `timestep_conditioning`) is told that no noise is left.
    """
    mean, std = _statistics(vae, latents)
    factor, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    latents = latents * std / factor + mean if mean is not None and std is not None else latents / factor + shift
    one = latents.ndim == 4 and _takes_frames(vae.config)
    with _encoding_dtype(vae) as dtype, torch.no_grad():
        given = (latents.unsqueeze(2) if one else latents).to(dtype)
        timed = vae.config.get("timestep_conditioning")
        time = {"temb": torch.zeros(len(given), device=given.device, dtype=dtype)} if timed else {}
        pixels = vae.decode(given, **time).sample
    return pixels.squeeze(2) if one else pixels


def _encode(vae: Any, pixels: Tensor) -> tuple[Any, torch.dtype]:
    """What `vae.encode` returns, and the dtype it ran in."""
    pixels = pixels.unsqueeze(2) if pixels.ndim == 4 and _takes_frames(vae.config) else pixels
    with _encoding_dtype(vae) as dtype, torch.no_grad():
        return vae.encode(pixels.to(dtype)), dtype


def _takes_frames(config: Mapping[str, Any]) -> bool:
    """Whether it is a video's autoencoder, to which an image is one frame: `(B, C, 1, H, W)`."""
    # As diffusers spells the first; LTX has the second.
    return config.get("temperal_downsample") is not None or "spatio_temporal_scaling" in config


def _code(out: Any) -> Tensor:
    """The deterministic code of an autoencoder without a posterior."""
    return out.latent if hasattr(out, "latent") else out.latents


def _check_finite(vae: Any, dtype: torch.dtype, latents: Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise FloatingPointError(
            f"The VAE ({type(vae).__name__}, {dtype}) gave NaN or infinite latents. Load it in float32 or bfloat16, "
            "or set force_upcast in its config."
        )


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-channel latent mean and std, where the VAE's config has them; of 2 x 2 latent pixels by a batch norm."""
    norm = getattr(vae, "bn", None)
    if norm is not None:
        std = torch.sqrt(norm.running_var + vae.config["batch_norm_eps"])
        tiles = (1, 1, like.shape[2] // 2, like.shape[3] // 2)
        return tuple(  # type: ignore[return-value]
            functional.pixel_shuffle(value.view(1, -1, 1, 1).to(like.device, like.dtype), 2).repeat(tiles)
            for value in (norm.running_mean, std)
        )
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if "spatio_temporal_scaling" in vae.config:  # LTX holds them as buffers
        mean, std = vae.latents_mean, vae.latents_std
    if mean is None or std is None:
        return None, None
    shape = (1, -1, *[1] * (like.ndim - 2))
    first, second = (torch.as_tensor(v, device=like.device, dtype=like.dtype).view(shape) for v in (mean, std))
    return first, second


@contextmanager
def _encoding_dtype(vae: Any) -> Iterator[torch.dtype]:
    """float32 weights while a VAE that overflows in half precision works; its own dtype again after."""
    if not vae.config.get("force_upcast"):
        yield vae.dtype
        return
    with _CASTING:  # what another thread has cast has come back by now
        dtype = vae.dtype
        if dtype != torch.float16:
            yield dtype
            return
        vae.to(dtype=torch.float32)
        try:
            yield torch.float32
        finally:
            vae.to(dtype=dtype)
