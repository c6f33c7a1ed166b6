"""Parallel decoding of masked tokens (MaskGIT, arXiv 2202.04200; MAGE, arXiv 2211.09117): how many, which, what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole

Schedule = Literal["cosine", "linear"]
Generators = torch.Generator | Sequence[torch.Generator] | None


def masked_counts(tokens: int, steps: int, schedule: Schedule = "cosine") -> list[int]:
    """Tokens that are still masked after each step; each step fixes one or more, the last the rest.

    `floor(N cos(pi (k + 1) / 2 S))` after step k of S, or `N (1 - (k + 1) / S)` rounded up. The codes of MAGE and ADDP
    leave one masked after their last step; here none is.

    Args:
        tokens: N.
        steps: S.
        schedule: `cosine` or `linear`.

    Raises:
        ValueError: For more steps than tokens, or another schedule.

    Example:
        >>> masked_counts(16, 8)
        [15, 14, 13, 11, 8, 6, 3, 0]
    """
    if check_whole("num_inference_steps", steps) > tokens:
        raise ValueError(
            f"num_inference_steps is {steps}, and there are {tokens} tokens: each step fixes at least one."
        )
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"schedule is 'cosine' or 'linear'; got {schedule!r}.")
    counts: list[int] = []
    for step in range(1, steps + 1):
        if schedule == "cosine":
            wanted = math.floor(tokens * math.cos(math.pi * step / (2 * steps)))
        else:
            wanted = -((steps - step) * -tokens // steps)  # rounded up, in whole numbers
        left = (counts[-1] if counts else tokens) - 1
        counts.append(0 if step == steps else max(1, min(wanted, left)))
    return counts


def sample_tokens(
    logits: Tensor, ids: Tensor, mask: Tensor, left: int, temperature: float, generator: Generators = None
) -> tuple[Tensor, Tensor]:
    """One step: an id for each masked token, and which stay masked: those of the lowest `log p + temperature Gumbel`.

    Args:
        logits: `(B, N, V)`, float32.
        ids: `(B, N)`; kept where a token is not masked.
        mask: `(B, N)`, boolean.
        left: Tokens that stay masked, at most as many as now.
        temperature: Of the noise of the choice; 0: the most certain stay.
        generator: One, or one a sample.

    Returns:
        All ids, those of tokens that stay masked being guesses, and the new mask.
    """
    # The largest of log p + Gumbel noise is a draw from p.
    drawn = (logits + _gumbel(tuple(logits.shape), generator, logits.device)).argmax(-1)
    ids = torch.where(mask, drawn, ids)
    certainty = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    if temperature:
        certainty = certainty + temperature * _gumbel(tuple(ids.shape), generator, logits.device)
    certainty = certainty.masked_fill(~mask, torch.inf)
    lowest = certainty.topk(left, dim=1, largest=False).indices
    return ids, torch.zeros_like(mask).scatter(1, lowest, True)


def _gumbel(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Gumbel noise; with a generator a sample each row depends on its own."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([_gumbel((1, *shape[1:]), one, device) for one in generator])
    assert generator is None or isinstance(generator, torch.Generator)
    where = device if generator is None else generator.device
    return -torch.empty(shape, device=where).exponential_(generator=generator).log().to(device)


__all__ = ["Generators", "Schedule", "masked_counts", "sample_tokens"]
