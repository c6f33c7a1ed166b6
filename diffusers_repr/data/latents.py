"""The latent cache: posterior moments of a VAE for every image and its mirror."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.cache_writer import CacheSettings, write_cache
from diffusers_repr.data.numpy_latents import NumpyLatents, is_numpy_latents
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.denoiser.vae import encode_moments
from diffusers_repr.hub.identity import config_hash, weights_hash
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.tensor_cache import LATENTS, TensorCache

_IMAGES = ("rows", "images", "channels", "size", "center_crop")  # of a fingerprint, what decides the pixels


def cache_latents(
    vae: Any,
    data: ImageTrainData,
    out: str | os.PathLike[str],
    settings: CacheSettings | None = None,
    revision: str | None = None,
) -> TensorCache:
    """Write the moments `cat[mean, std]`, unscaled, of every image and of its mirror.

    A mirrored image is encoded by itself: a latent cannot be flipped. The same call goes on where an earlier one was
    stopped; under `accelerate launch` the processes share the work.

    Args:
        vae: An autoencoder of diffusers; it is moved to the process's device.
        data: The images as training crops them, before any augmentation.
        out: Folder of the cache.
        settings: Mirrors, dtype, batch size and more.
        revision: Of the VAE, for the manifest.

    Raises:
        FileExistsError: If the folder holds a cache of another VAE, crop, size or data, or latents of REPA's own.
        ValueError: If moments overflow the dtype, or an image cannot be read.
        FloatingPointError: If the VAE gives NaN.
        OSError: If the disk is full; what is written stays valid.
    """
    if is_numpy_latents(out):
        raise FileExistsError(f"{str(out)!r} holds latents of REPA's preprocessing; write the cache elsewhere.")
    settings = settings or CacheSettings()
    vae.to(settings.device or process_state().device).eval()

    def moments(pixels: Tensor) -> dict[str, Tensor]:
        return {"moments": encode_moments(vae, pixels)}

    recipe = {"vae": vae_fingerprint(vae), "data": image_fingerprint(data)}
    about = {"vae": plain_name(vae.config.get("_name_or_path")), "revision": revision}
    return write_cache(out, LATENTS, data, moments, recipe, settings, about)


def open_latents(
    folder: str | os.PathLike[str], data: ImageTrainData, vae: Any, flip: bool
) -> TensorCache | NumpyLatents:
    """The latent cache of a run, or the `vae-sd` folder of REPA's preprocessing.

    Args:
        folder: Where it lies.
        data: The images of the run.
        vae: Of the run.
        flip: Whether the run mirrors images.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not finished, or was made with another VAE, crop, size or data, or without mirrors.
    """
    if is_numpy_latents(folder):
        return NumpyLatents(folder, data, vae, flip)
    cache = TensorCache.open(folder, LATENTS)
    cache.check({"data": image_fingerprint(data), "vae": vae_fingerprint(vae)}, 2 if flip else 1)
    return cache


def vae_fingerprint(vae: Any) -> dict[str, Any]:
    """What decides the moments, and how they are scaled, as JSON; not where the VAE came from."""
    config = {key: value for key, value in dict(vae.config).items() if not key.startswith("_")}
    return {
        "class": type(vae).__name__,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "scaling_factor": config.get("scaling_factor"),
        "shift_factor": config.get("shift_factor"),
        "config": config_hash(config),
        "weights": weights_hash(vae),
    }


def image_fingerprint(data: TrainData) -> dict[str, Any]:
    """The part of a data set's fingerprint that decides its pixels: labels and captions may change."""
    found = data.fingerprint()
    return {key: found[key] for key in _IMAGES}


def plain_name(path: Any) -> str | None:
    """A Hub id as it is; of a local folder its own name."""
    return None if not path else Path(path).resolve().name if os.path.isdir(path) else str(path)
