"""Logits of a `FeedbackHead` with its gradient: two forwards of the network, of which the second is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_repr.capture.feedback import FeedbackPasses, Run
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.pooling import pool
from diffusers_repr.heads.feedback import FeedbackHead


def feedback_logits(
    head: FeedbackHead, passes: FeedbackPasses, run: Run, denoiser: Denoiser, size: tuple[int, ...], pooling: str
) -> Tensor:
    """`(B, K)`; the gradient reaches the head alone, through the network to what is fed back.

    Args:
        head: It has the levels that `run` has, one after the other.
        passes: Of its sources, targets and layers.
        run: Calls the network on x_t `(levels * B, ...)`, all images at the first level, then at the second.
        denoiser: Of that network.
        size: (H, W) of x_t.
        pooling: Of the maps that are read, `map:P`.
    """
    levels, first = int(head.config["levels"]), passes.first(run)

    def second(fed: dict[str, Tensor]) -> dict[str, Tensor]:
        return pooled_levels(passes.second(run, first, fed), denoiser, size, pooling, levels)

    logits: Any = head(dict(first.features), second_pass=second)
    return logits


def pooled_levels(
    features: Mapping[str, Tensor], denoiser: Denoiser, size: tuple[int, ...], pooling: Any, levels: int
) -> dict[str, Tensor]:
    """Pooled features by layer, `(levels, B, ...)`, of what layers gave for `(levels * B, ...)`.

    Args:
        features: Layer path -> maps or tokens.
        denoiser: Of the network.
        size: (H, W) of x_t.
        pooling: As in `FeatureExtractor`.
        levels: Noise levels in the batch.
    """
    found = {}
    for path, value in features.items():
        place = denoiser.token_grid(path, value.shape[1], size) if value.ndim == 3 else None
        found[path] = pool(value, pooling, place).unflatten(0, (levels, -1))
    return found


__all__ = ["feedback_logits", "pooled_levels"]
