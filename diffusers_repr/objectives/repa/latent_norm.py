"""`LatentNorm`: batch normalisation of latents without a learned part, as REPA-E puts it between VAE and network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LatentNorm(nn.Module):
    """`(z - mean) / sqrt(var + eps)` a channel: of the batch in training mode, of the running averages else.

    What `BatchNorm2d(affine=False)` does, over the batches of all processes together. The statistics of a batch carry
    no gradient: REPA-E normalises latents that are detached.

    Args:
        channels: Of the latents.
        eps: 1e-4 in REPA-E (arXiv 2504.10483).
        momentum: Share of the newest batch in the running averages.

    Attributes:
        mean: Running mean `(channels,)`.
        var: Running variance.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-4, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    @torch.no_grad()
    def set_statistics(self, mean: Any, std: Any) -> None:
        """Start from known statistics of the latents, a number or one a channel."""
        self.mean.copy_(torch.as_tensor(mean, dtype=self.mean.dtype).expand_as(self.mean))
        self.var.copy_(torch.as_tensor(std, dtype=self.var.dtype).expand_as(self.var).square())

    def forward(self, latents: Tensor) -> Tensor:
        """Normalised `(B, C, h, w)`, float32 or wider."""
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        mean, var = self._batch(latents.detach()) if self.training else (self.mean, self.var)
        mean, var = (value.to(latents.dtype).view(1, -1, 1, 1) for value in (mean, var))
        return (latents - mean) * torch.rsqrt(var + self.eps)

    def invert(self, normalized: Tensor) -> Tensor:
        """Latents again, by the running averages."""
        mean, var = (value.to(normalized.dtype).view(1, -1, 1, 1) for value in (self.mean, self.var))
        return normalized * torch.sqrt(var + self.eps) + mean

    def _batch(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch; the running averages move towards them."""
        wide = latents.double() if latents.device.type != "mps" else latents
        count = torch.full((1,), wide.numel() // wide.shape[1], dtype=wide.dtype, device=wide.device)
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, squares, number = sums[: wide.shape[1]], sums[wide.shape[1] : -1], sums[-1]
        mean = total / number
        var = (squares / number - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
            self.var.lerp_((var * number / (number - 1)).to(self.var.dtype), self.momentum)
        return mean, var


__all__ = ["LatentNorm"]
