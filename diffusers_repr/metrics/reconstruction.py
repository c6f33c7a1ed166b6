"""How near are reconstructions to their images: squared error, SSIM, and distance in an encoder's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.metrics.ssim import ssim

_WINDOW = 11  # of SSIM, Wang et al. 2004


def reconstruction_errors(
    images: Tensor, reconstructed: Tensor, encoder: Any = None, *, window: int | None = None, batch_size: int = 64
) -> dict[str, Tensor]:
    """Of every image `mse`, `ssim` and, with an encoder, `feature_distance`.

    All are of pixels in [0, 1]; values that a decoder gives beyond are clipped first.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        reconstructed: Of the same shape, row by row.
        encoder: An `Encoder` of your own; see `feature_distance`.
        window: Side of SSIM's window; None: 11 pixels, as in the paper, or the largest odd one that fits.
        batch_size: Images a forward of the encoder.

    Returns:
        Name -> `(B,)`.

    Raises:
        ValueError: For unequal shapes, or images that are not in [0, 1].

    Example:
        >>> x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> {name: value.tolist() for name, value in reconstruction_errors(x, x).items()}
        {'mse': [0.0, 0.0], 'ssim': [1.0, 1.0]}
    """
    if images.ndim != 4 or images.shape != reconstructed.shape or not len(images):
        raise ValueError(
            f"Images and reconstructions are (B, C, H, W) of one shape; got {tuple(images.shape)} and "
            f"{tuple(reconstructed.shape)}."
        )
    images, reconstructed = images.detach().double().cpu(), reconstructed.detach().double().cpu()
    if not bool(torch.isfinite(reconstructed).all()):
        raise ValueError("Reconstructions hold NaN or infinite values; look at the decoder's dtype and steps.")
    reconstructed = reconstructed.clamp(0, 1)
    side = min(images.shape[2:])
    size = min(_WINDOW, side - 1 + side % 2) if window is None else window
    found = {
        "mse": (images - reconstructed).square().flatten(1).mean(1),
        "ssim": ssim(images, reconstructed, window=size),
    }
    if encoder is not None:
        found["feature_distance"] = feature_distance(encoder, images, reconstructed, batch_size=batch_size)
    return found


def feature_distance(encoder: Any, a: Tensor, b: Tensor, *, batch_size: int = 64) -> Tensor:
    """`(B,)`: mean over the encoder's positions of `|u - v|^2`, u and v the features there, scaled to length 1.

    This is what LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) takes of one layer, with all weights 1, by a
    network of your choice: 0 for equal features, 2 for unrelated ones, 4 at most. It compares between
    reconstructions by one encoder only, and is not LPIPS of the published weights.

    Args:
        encoder: What gives tokens.
        a: `(B, C, H, W)` in [0, 1].
        b: Of the same shape.
        batch_size: Images a forward.
    """
    found = []
    for one, other in zip(a.float().split(batch_size), b.float().split(batch_size), strict=True):
        u, v = (F.normalize(encoder.encode_pixels(2 * x - 1).tokens.double().cpu(), dim=-1) for x in (one, other))
        found.append((u - v).square().sum(-1).mean(1))
    return torch.cat(found)


__all__ = ["feature_distance", "reconstruction_errors"]
