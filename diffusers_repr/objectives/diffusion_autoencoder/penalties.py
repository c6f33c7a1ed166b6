"""What keeps the codes of all images together near the standard normal: MMD, and the KL divergence with a capacity."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["imq", "rbf"]
KERNELS: tuple[Kernel, ...] = ("imq", "rbf")
SCALES = (0.5, 1.0, 2.0, 4.0)


def mmd(codes: Tensor, prior: Tensor, kernel: Kernel = "imq") -> Tensor:
    """Squared maximum mean discrepancy of two samples, unbiased (Gretton et al. 2012, eq. 3): 0 on average if equal.

    `mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)`, of the kernel summed over
    scales s: `imq`: `C / (C + |x - y|^2)`, or `rbf`: `exp(-|x - y|^2 / C)`, with `C = 2 D s`, for the mean squared
    distance of two standard normals is 2 D. InfoDiffusion's own kernel divides by D twice and hardly sees the spread.

    Args:
        codes: x, `(B, D)`, two or more.
        prior: y, `(B', D)`, two or more.
        kernel: One of `KERNELS`.

    Raises:
        ValueError: For another kernel, other widths and fewer than two of either.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is one of {', '.join(KERNELS)}; got {kernel!r}.")
    if codes.ndim != 2 or prior.ndim != 2 or codes.shape[1] != prior.shape[1] or min(len(codes), len(prior)) < 2:
        raise ValueError(
            f"MMD compares (B, D) with (B', D), two rows or more of each; got {tuple(codes.shape)} and "
            f"{tuple(prior.shape)}. Train with two images or more a batch."
        )
    wide = torch.promote_types(codes.dtype, torch.float32)
    x, y = codes.to(wide), prior.to(wide)
    return _apart(x, kernel) + _apart(y, kernel) - 2 * _kernel(_distances(x, y), x.shape[1], kernel).mean()


def _apart(rows: Tensor, kernel: Kernel) -> Tensor:
    """Mean kernel of all pairs of different rows; the pairs of a row with itself are 1 a scale."""
    count = len(rows)
    total = _kernel(_distances(rows, rows), rows.shape[1], kernel).sum()
    return (total - count * len(SCALES)) / (count * (count - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances `(B, B')`; of a row with itself 0 and without a gradient."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    if x is y:
        squares = squares * (1 - torch.eye(len(x), device=x.device, dtype=x.dtype))
    return squares.clamp(min=0)


def _kernel(squares: Tensor, dim: int, kernel: Kernel) -> Tensor:
    scales = [2 * dim * scale for scale in SCALES]
    if kernel == "imq":
        return torch.stack([scale / (scale + squares) for scale in scales]).sum(0)
    return torch.stack([(-squares / scale).exp() for scale in scales]).sum(0)


def kl_divergence(mean: Tensor, log_variance: Tensor, capacity: float | None = None) -> Tensor:
    """Of `N(mean, exp(log_variance))` from `N(0, I)`, summed over the code and averaged over the batch.

    Args:
        mean: `(B, D)`.
        log_variance: `(B, D)`.
        capacity: C of `|KL - C|` (Burgess et al. 2018, arXiv 1804.03599), in nats; None: the divergence itself.

    Example:
        >>> kl_divergence(torch.zeros(3, 2), torch.zeros(3, 2)).item()
        0.0
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, log_variance = mean.to(wide), log_variance.to(wide)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return kl if capacity is None else (kl - capacity).abs()


__all__ = ["KERNELS", "Kernel", "kl_divergence", "mmd"]
