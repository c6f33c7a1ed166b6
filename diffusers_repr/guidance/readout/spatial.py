"""Readouts towards a target map (edges, depth, a pose): Readout Guidance (Luo et al. 2024, arXiv 2312.02150)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffusers_repr.guidance.readout.base import (
    Comparison,
    as_mask,
    as_tensor,
    at_readout,
    check_row,
    span,
    weighted_mean,
    without_row,
)
from diffusers_repr.heads import MapHead


@dataclass(frozen=True, eq=False)
class SpatialComparison(Comparison):
    """How far readouts are from a target.

    Attributes:
        target: `(B or 1, C, H, W)` once checked.
        mask: Weights of places, `(B or 1, 1, H, W)`, or None.
        reference_row: A sample that is not guided, or None.
        rescale: As `spatial_loss`.
    """

    target: Any = None
    mask: Any = None
    reference_row: int | None = None
    rescale: bool = True
    needs: ClassVar[tuple[str, ...]] = ("target",)

    def __post_init__(self) -> None:
        self._set("target", _target(self.target, self.head))
        self._set("mask", None if self.mask is None else as_mask(self.mask))
        check_row(self.reference_row)

    def loss(self, read: Tensor, reference: Tensor | None, x: Tensor) -> Tensor:
        """As `spatial_loss`."""
        published = self.published
        target = at_readout("target", self.target, read, nearest=published)
        weights = None if self.mask is None else at_readout("mask", self.mask, read, nearest=published)
        loss = spatial_loss(read, target, x, self.head.range, rescale=self.rescale, weights=weights, whole=published)
        return loss if self.reference_row is None else without_row(loss, self.reference_row)


def spatial_loss(
    read: Tensor,
    target: Tensor,
    x: Tensor,
    label_range: tuple[float, float],
    *,
    rescale: bool = True,
    weights: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """`mean (phi(r) - phi(target))^2` with `phi(y) = (y - a) / (b - a) (M - m) + m`.

    (a, b) is the head's range and (m, M) the smallest and largest value of the sample's latents, constant in the
    gradient. phi is affine, so the loss is `mean (r - target)^2 ((M - m) / (b - a))^2`.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        target: `(B or 1, C, H, W)`.
        x: Latents, `(B, ...)`.
        label_range: (a, b).
        rescale: False leaves phi out.
        weights: Of places, `(B or 1, 1, H, W)`: a weighted mean.
        whole: Take (m, M) from the whole batch.

    Returns:
        `(B,)`.
    """
    loss = weighted_mean((read - target).square().mean(1, keepdim=True), weights)
    if not rescale:
        return loss
    low, high = label_range
    return loss * (span(x, whole=whole) / (high - low)).square().to(loss.dtype)


def _target(value: Any, head: MapHead) -> Tensor:
    """As `(B, C, H, W)`, with the channels and in the range of the head's labels."""
    found, channels = as_tensor("target", value), int(head.config.get("out_channels", 1))
    shape = tuple(found.shape)
    while 2 <= found.ndim < 4:
        found = found[None]
    if found.ndim != 4 or found.shape[1] != channels:
        allowed = f"({channels}, H, W) or (B, {channels}, H, W)"
        allowed = f"(H, W), {allowed}" if channels == 1 else allowed
        raise ValueError(f"target of this head must be {allowed}; got {shape}.")
    low, high = head.range
    slack = 1e-3 * (high - low)
    least, most = float(found.min()), float(found.max())
    if least < low - slack or most > high + slack:
        raise ValueError(
            f"target spans {least:g} to {most:g}; this head's labels lie in [{low:g}, {high:g}]. Map it there."
        )
    return found
