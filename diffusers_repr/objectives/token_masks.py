"""Which tokens are masked in training, and the loss of what is told in their places: MAGE's and ADDP's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.models.vq_tokens import encode_tokens, token_stride, vocabulary_size
from diffusers_repr.objectives.auxiliary.base import full_precision, widen

TOKENS = "tokens"


def truncated_normal(uniform: Tensor, low: float, high: float, mean: float, std: float) -> Tensor:
    """Draws of a normal distribution inside [low, high], by the inverse of its distribution function, in float64.

    Args:
        uniform: In [0, 1], any shape.
        low: Smallest value.
        high: Largest value.
        mean: Of the whole normal distribution.
        std: Likewise.

    Example:
        >>> [round(x, 6) for x in truncated_normal(torch.tensor([0.0, 1.0]), 0.5, 1.0, 0.55, 0.25).tolist()]
        [0.5, 1.0]
    """
    ends = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64, device=uniform.device)
    first, last = torch.special.ndtr(ends)
    return (mean + std * torch.special.ndtri(first + uniform.double() * (last - first))).clamp(low, high)


def ratio_ladder(low: float, high: float, mean: float, std: float, steps: int = 100) -> tuple[list[float], Tensor]:
    """Shares of masked tokens that ADDP's sampler passes through, rising, and how often each is drawn.

    `cos(pi i / 2 steps)` in [low, high), with the density of a truncated normal distribution (ADDP's code).

    Args:
        low: Smallest share.
        high: What shares stay below.
        mean: Of the normal distribution.
        std: Likewise.
        steps: Of the ladder from 1 to 0.

    Returns:
        The shares, and their probabilities, float64.

    Raises:
        ValueError: If none lies between.
    """
    every = torch.arange(steps, -1, -1, dtype=torch.float64).mul(math.pi / 2 / steps).cos().clamp(0, 1)
    shares = every[(every >= low) & (every < high)]
    if not len(shares):
        raise ValueError(f"No share of a ladder of {steps} steps lies from {low} to below {high}.")
    density = (-((shares - mean) / std).square() / 2).exp()
    return shares.tolist(), density / density.sum()


def batch_tokens(batch: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """Ids `(B, N)` of a batch: those in its `tokens`, or those of its images."""
    ids = batch[TOKENS] if batch.get(TOKENS) is not None else encode_tokens(tokenizer, batch["pixel_values"])
    return ids.long().flatten(1)


def check_token_batch(batch: Mapping[str, Any], network: Any, tokenizer: Any) -> None:
    """Refuse a batch, still on the CPU, whose tokens a network cannot use; no image is encoded for it.

    Args:
        batch: With `tokens` or `pixel_values`.
        network: Of the tokens.
        tokenizer: That gives them.

    Raises:
        ValueError: Without tokens and images, for another number of tokens, and ids outside of the vocabulary.
    """
    ids, images = batch.get(TOKENS), batch.get("pixel_values")
    if ids is None and images is None:
        raise ValueError("The batch has neither tokens nor images (pixel_values); latents of a VAE are no tokens.")
    grid = None
    if ids is None and images is not None:
        grid = tuple(side // token_stride(tokenizer) for side in images.shape[2:])
    if grid not in (None, network.grid) or (ids is not None and ids[0].numel() != network.num_tokens):
        found = " x ".join(map(str, grid or [ids[0].numel()]))  # type: ignore[index]
        raise ValueError(
            f"An image is {found} tokens of this tokenizer, and the network is made for {network.grid[0]} x "
            f"{network.grid[1]}: set its sample_size, or the size of the images."
        )
    size = vocabulary_size(tokenizer)
    if ids is not None and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise ValueError(
            f"The tokens are {int(ids.min())} to {int(ids.max())}; the tokenizer's are 0 to {size - 1}: they were "
            "made by a tokenizer of another vocabulary. Encode them again."
        )


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy, its mean over a sample's masked tokens, and then over the samples; a scalar.

    `-sum_v ((1 - smoothing) q_v + smoothing / V) log p_v`. Where all samples have equally many masked tokens it is the
    mean over all of them; of each sample by itself it does not depend on how a batch is divided among processes.

    Args:
        logits: `(B, N, V)`.
        targets: Ids `(B, N)`, or probabilities q `(B, N, V)`.
        mask: `(B, N)`, boolean, with a True in every row.
        smoothing: Share of a target that is spread over all ids.
    """
    with full_precision(logits.device):
        logits = widen(logits)
        soft = targets.transpose(1, 2).to(logits.dtype) if targets.ndim == 3 else targets
        losses = F.cross_entropy(logits.transpose(1, 2), soft, reduction="none", label_smoothing=smoothing)
        # `where`: what is not masked is not touched, not even by a NaN.
        return (torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean()


__all__ = [
    "TOKENS",
    "batch_tokens",
    "check_token_batch",
    "masked_cross_entropy",
    "ratio_ladder",
    "truncated_normal",
]
