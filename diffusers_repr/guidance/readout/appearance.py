"""Readouts alike those of a reference, place by place: Readout Guidance (Luo et al. 2024, arXiv 2312.02150)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from diffusers_repr.guidance.readout.base import as_mask, as_pixels, at_readout, span, weighted_mean
from diffusers_repr.guidance.readout.reference import ReferenceComparison

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class AppearanceComparison(ReferenceComparison):
    """How far readouts are from a reference's in direction.

    Attributes:
        mask: Weights of places, `(B or 1, 1, H, W)`, or None.
        boxes: As `appearance_loss`.
        pooled: As `appearance_loss`.
        rescale: As `appearance_loss`.
    """

    mask: Any = None
    boxes: Any = None
    pooled: bool = False
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.mask is not None and (self.boxes is not None or self.pooled):
            raise ValueError("mask weighs places; give it without boxes and pooled.")
        self._set("mask", None if self.mask is None else as_mask(self.mask))
        super().__post_init__()
        self._set("boxes", None if self.boxes is None else _boxes(self.boxes))

    def distance(self, read: Tensor, reference: Tensor, x: Tensor) -> Tensor:
        """As `appearance_loss`."""
        weights = None if self.mask is None else at_readout("mask", self.mask, read, nearest=self.published)
        return appearance_loss(
            read,
            reference,
            x,
            rescale=self.rescale,
            weights=weights,
            boxes=self.boxes,
            pooled=self.pooled,
            whole=self.published,
        )


def appearance_loss(
    read: Tensor,
    reference: Tensor,
    x: Tensor,
    *,
    rescale: bool = True,
    weights: Tensor | None = None,
    boxes: tuple[Box, Box] | None = None,
    pooled: bool = False,
    whole: bool = False,
) -> Tensor:
    """`mean (1 - cos(r, r_reference)) (M - m)^2`, cosines over the channels at each place.

    Args:
        read: Readouts r, `(B, C, H, W)`.
        reference: Those of the reference, the same shape.
        x: Latents, `(B, ...)`; (m, M) is their range.
        rescale: False leaves `(M - m)^2` out.
        weights: Of places, `(B or 1, 1, H, W)`: a weighted mean.
        boxes: Of the reference and of the samples, (top, left, bottom, right) in pixels of the readouts, the last two
            not included: both are resized to the whole map.
        pooled: Compare the means over the map (or the box) instead of places.
        whole: Take (m, M) from the whole batch.

    Returns:
        `(B,)`.
    """
    if boxes is not None:
        size = (read.shape[2], read.shape[3])
        reference, read = (_crop(part, box, size) for part, box in zip((reference, read), boxes, strict=True))
    if pooled:
        reference, read = reference.mean((2, 3), keepdim=True), read.mean((2, 3), keepdim=True)
    loss = weighted_mean(1 - functional.cosine_similarity(reference, read, dim=1)[:, None], weights)
    return loss * span(x, whole=whole).square().to(loss.dtype) if rescale else loss


def _crop(maps: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    top, left, bottom, right = box
    if bottom > size[0] or right > size[1]:
        raise ValueError(
            f"Box {box} reaches outside of the readouts, which are {size[0]} x {size[1]} (H x W); a box is (top, "
            "left, bottom, right) in their pixels."
        )
    return functional.interpolate(maps[:, :, top:bottom, left:right], size, mode="bilinear")


def _boxes(value: Any) -> tuple[Box, Box]:
    """As two boxes of whole numbers, none of them empty."""
    if not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"boxes must be two, the reference's and the samples'; got {value!r}.")
    found = tuple(as_pixels("A box", box, "top, left, bottom, right") for box in value)
    for top, left, bottom, right in found:
        if top >= bottom or left >= right:
            raise ValueError(f"A box must have top < bottom and left < right; got {(top, left, bottom, right)}.")
    return found  # type: ignore[return-value]
