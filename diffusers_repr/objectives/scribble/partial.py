"""Partial cross-entropy: of the pixels that have a class, and of no others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.data.masks import IGNORE_INDEX


def partial_cross_entropy(logits: Tensor, masks: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The mean over the labelled pixels of a batch of `-log softmax(logits)[class]`; 0 where there is none.

    Args:
        logits: `(B, K, H, W)`.
        masks: `(B, H, W)` int64 class ids.
        ignore_index: Id of pixels without a class.

    Raises:
        ValueError: For masks of another size than the logits.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 1, 2)
        >>> round(float(partial_cross_entropy(logits, torch.tensor([[[1, 255]]]))), 4)
        0.6931
    """
    if masks.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(f"Masks are {tuple(masks.shape)}, logits {tuple(logits.shape)}; bring them to one size.")
    total = F.cross_entropy(logits.float(), masks, ignore_index=ignore_index, reduction="sum")
    return total / (masks != ignore_index).sum().clamp(min=1)


__all__ = ["partial_cross_entropy"]
