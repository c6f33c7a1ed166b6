"""Structural similarity of images (Wang et al. 2004), differentiable.

Around every pixel, with means m, variances v and covariance c under a Gaussian window,

    SSIM = (2 m_a m_b + C1) (2 c + C2) / ((m_a^2 + m_b^2 + C1) (v_a + v_b + C2))        C1 = 0.01^2, C2 = 0.03^2

for values in [0, 1]. The formula does not change when both the means' and the covariance's signs do, so in [-1, 1] an
image and its negative are called all but equal: bring images to [0, 1] first.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole

Edges = Literal["valid", "reflect"]

_C1, _C2 = 0.01**2, 0.03**2
_OUTSIDE = 1e-3  # how far beyond [0, 1] a value is still one of rounding


def ssim_map(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5, edges: Edges = "valid") -> Tensor:
    """SSIM around every pixel of every channel; the mathematics, without a look at the values' range.

    For a loss: predictions may leave [0, 1], and nothing is read back from the device.

    Args:
        a: `(B, C, H, W)`, in [0, 1] but for what a prediction adds.
        b: Of the same shape.
        window: Side of the Gaussian window in pixels, odd; 11 in the paper.
        sigma: Standard deviation of the window in pixels; 1.5 in the paper.
        edges: `valid` takes the pixels whose window lies in the image (as the paper's code and scikit-image);
            `reflect` all of them, the image mirrored at its edges without the edge pixel (as torchmetrics).

    Returns:
        `(B, C, H', W')` in float32, or float64 for float64 images; H' and W' are `H - window + 1` and
        `W - window + 1` with `valid`, else H and W.

    Raises:
        ValueError: For unequal shapes, an even window, a window that does not fit, a sigma that is not above 0.
    """
    _check(a, b, window, sigma, edges)
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    moments = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 1)
    if edges == "reflect":
        moments = torch.nn.functional.pad(moments, [window // 2] * 4, mode="reflect")
    weights = [2.718281828459045 ** (-((k - window // 2) ** 2) / (2 * sigma**2)) for k in range(window)]
    for axis in (2, 3):
        moments = _weighted(moments, [w / sum(weights) for w in weights], axis)
    m_a, m_b, aa, bb, ab = moments.unflatten(0, (5, len(a)))
    v_a, v_b, c = aa - m_a**2, bb - m_b**2, ab - m_a * m_b
    return (2 * m_a * m_b + _C1) * (2 * c + _C2) / ((m_a**2 + m_b**2 + _C1) * (v_a + v_b + _C2))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5, edges: Edges = "valid") -> Tensor:
    """Mean SSIM of each pair of images, over pixels and channels: 1 for equal ones, below 0 for negatives.

    Args:
        a: `(B, C, H, W)` in [0, 1].
        b: Of the same shape, in [0, 1].
        window: As `ssim_map`; for images of 8 x 8 pixels take 5 or 7.
        sigma: As `ssim_map`.
        edges: As `ssim_map`.

    Returns:
        `(B,)` in float32, or float64 for float64 images.

    Raises:
        ValueError: As `ssim_map`, and for values that are not in [0, 1].

    Example:
        >>> ramp = torch.arange(64.0).reshape(1, 1, 8, 8) / 63
        >>> ssim(ramp, ramp, window=5).item(), ssim(ramp, 1 - ramp, window=5).item() < 0
        (1.0, True)
    """
    for name, images in (("a", a), ("b", b)):
        low, high = (float(x) for x in images.detach().aminmax()) if images.numel() else (0.0, 0.0)
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):
            raise ValueError(
                f"SSIM is of values in [0, 1]; {name} goes from {low:.3g} to {high:.3g}. Images in [-1, 1] are "
                "brought there by `(x + 1) / 2`, predictions by `.clamp(0, 1)`."
            )
    return ssim_map(a, b, window, sigma, edges).mean(dim=(1, 2, 3))


def _weighted(images: Tensor, weights: list[float], axis: int) -> Tensor:
    """Weighted sum of shifted images along an axis.

    Not a convolution: on a GPU, and under autocast, those round their input to ten bits or seven, and a variance is a
    difference of means that are all but equal.
    """
    size = images.shape[axis] - len(weights) + 1
    total = weights[0] * images.narrow(axis, 0, size)
    for k, w in enumerate(weights[1:], start=1):
        total = total.add(images.narrow(axis, k, size), alpha=w)
    return total


def _check(a: Tensor, b: Tensor, window: int, sigma: float, edges: str) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"SSIM compares images (B, C, H, W) of one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if edges not in get_args(Edges):
        raise ValueError(f"edges={edges!r}; expected one of {', '.join(get_args(Edges))}.")
    if check_whole("window", window) % 2 == 0:
        raise ValueError(f"window must be odd, to have a middle; got {window}.")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0; got {sigma!r}.")
    h, w = a.shape[2:]
    reach = window if edges == "valid" else window // 2 + 1
    if min(h, w) < reach:
        raise ValueError(
            f"A window of {window} pixels does not fit images of {h} x {w}; take one of at most "
            f"{_largest(min(h, w), edges)}" + (", or edges='reflect'." if edges == "valid" else ".")
        )


def _largest(side: int, edges: str) -> int:
    """The largest odd window that images of this side allow."""
    return side - 1 + side % 2 if edges == "valid" else 2 * side - 1


__all__ = ["Edges", "ssim", "ssim_map"]
