"""`measure_reconstruction`: what comes back of images that a model encodes, from inferred and from drawn noise."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.inversion import ddim_generate, ddim_invert
from diffusers_repr.encoders import Encoder
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.own_pipelines import own_pipeline_class
from diffusers_repr.metrics import reconstruction_errors

INFERRED, DRAWN = "inferred", "random"


def measure_reconstruction(
    model: Any,
    images: Tensor,
    *,
    steps: int = 50,
    encoder: Encoder | None = None,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Means over images of `mse_inferred`, `ssim_inferred` and, with an encoder, `feature_distance_inferred`.

    Of a diffusion autoencoder also `mse_random` and so on: what its code alone tells of an image. The two are kept
    apart, because noise that is inferred holds nearly all of an image, whatever the code is worth; a plain model
    inverts as well, and has the first kind alone.

    Args:
        model: A diffusion autoencoder's pipeline, a `Denoiser`, or the folder or Hub id of one or the other.
        images: `(N, C, H, W)` in [0, 1], of the model's size.
        steps: Of DDIM, to the noise and back.
        encoder: Of features to compare by, see `feature_distance`.
        window: Of SSIM, see `reconstruction_errors`.
        seed: Of drawn noise.
        batch_size: Images at a time.

    Raises:
        TypeError: For a model that neither encodes and decodes nor denoises.
        ValueError: For images that do not fit.
    """
    found = reconstruct(model, images, steps=steps, seed=seed, batch_size=batch_size)
    scores: dict[str, float] = {}
    for kind, back in found.items():
        errors = reconstruction_errors(images, back, encoder, window=window, batch_size=batch_size)
        scores |= {f"{name}_{kind}": float(values.mean()) for name, values in errors.items()}
    return scores


@torch.no_grad()
def reconstruct(
    model: Any, images: Tensor, *, steps: int = 50, seed: int = 0, batch_size: int = 64
) -> dict[str, Tensor]:
    """Images that come back, `inferred` and, of a diffusion autoencoder, `random`: `(N, C, H, W)` in [0, 1].

    Args:
        model: See `measure_reconstruction`, also for the rest.
        images: `(N, C, H, W)` in [0, 1].
        steps: Of DDIM.
        seed: Of drawn noise; one stream an image, so that batches change nothing.
        batch_size: Images at a time.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images are a tensor (N, C, H, W) in [0, 1]; got {got}.")
    check_whole("steps", steps)
    opened = open_codec(model)
    parts: dict[str, list[Tensor]] = {}
    for at in range(0, len(images), batch_size):
        batch = images[at : at + batch_size]
        generators = [torch.Generator().manual_seed(seed + row) for row in range(at, at + len(batch))]
        made = _plain(opened, batch, steps) if isinstance(opened, Denoiser) else _coded(
            opened, batch, steps, generators
        )  # fmt: skip
        for kind, back in made.items():
            parts.setdefault(kind, []).append(back.float().cpu())
    return {kind: torch.cat(rows) for kind, rows in parts.items()}


def open_codec(model: Any) -> Any:
    """What encodes and decodes: a diffusion autoencoder's pipeline, else a `Denoiser`, from a folder or Hub id too.

    Args:
        model: See `measure_reconstruction`.

    Raises:
        TypeError: For what does neither.
    """
    if isinstance(model, (str, os.PathLike)):
        own = own_pipeline_class(str(model))
        if own is None or not _codes(own):
            return Denoiser.from_pretrained(str(model))
        model = own.from_pretrained(str(model))
        model.set_progress_bar_config(disable=True)
    if not isinstance(model, Denoiser) and not _codes(model):
        raise TypeError(
            f"{type(model).__name__} reconstructs nothing: pass a pipeline with `encode` and `decode`, or a Denoiser."
        )
    return model


def is_codec(place: str) -> bool:
    """Whether a folder or Hub id is a pipeline of this package that encodes and decodes."""
    try:
        own = own_pipeline_class(place)
    except (OSError, ValueError):
        return False
    return own is not None and _codes(own)


def _codes(model: Any) -> bool:
    return callable(getattr(model, "encode", None)) and callable(getattr(model, "reconstruct", None))


def _coded(pipe: Any, images: Tensor, steps: int, generators: list[torch.Generator]) -> dict[str, Tensor]:
    code = pipe.encode(images, steps)
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    return {
        INFERRED: pipe.decode(code.code, code.x_T, **settings).images,
        DRAWN: pipe.decode(code.code, None, generator=generators, **settings).images,
    }


def _plain(denoiser: Denoiser, images: Tensor, steps: int) -> dict[str, Tensor]:
    noise = ddim_invert(denoiser, denoiser.encode_pixels(2 * images.float() - 1), steps)
    return {INFERRED: denoiser.decode(ddim_generate(denoiser, noise, steps).to(denoiser.dtype))}


__all__ = ["DRAWN", "INFERRED", "is_codec", "measure_reconstruction", "open_codec", "reconstruct"]
