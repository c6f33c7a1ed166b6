"""Attention that tokens receive, without the map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.guidance.attention.interception import intercepted
from diffusers_repr.guidance.attention.projections import Projections, project

_SCRATCH = 2**24  # scores held at once by default: 64 MiB in float32


def attention_received(
    module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any], chunk: int | None = None
) -> Tensor:
    """How much attention each token receives: `a_j = sum_i mean_heads A[i, j]` (SAG, arXiv 2210.00939).

    The map is never held: probabilities are made for some query rows at a time, in float32 or wider.

    Args:
        module: Self-attention of any processor.
        layout: Self-attention.
        arguments: The call's arguments by name.
        chunk: Query rows at once; about 64 MiB of scores if None.

    Returns:
        `(B, T)`, float32 (float64 for a float64 module); the mean over T is 1.

    Raises:
        ValueError: For other layouts.
    """
    if layout.text is not None or layout.linear:
        raise ValueError(f"Attention received is defined for self-attention; this is {layout.name}.")
    if layout.processors:
        return received_by(project(module, layout, arguments), chunk)
    found: list[Tensor] = []

    def read(calls: Projections) -> Tensor:
        found.append(received_by(calls, chunk))
        return torch.zeros_like(calls.query)  # what the module makes of it is not asked for

    intercepted(module, layout, arguments, read)
    return found[0]


def received_by(calls: Projections, chunk: int | None = None) -> Tensor:
    """As `attention_received`, of queries and keys."""
    wide = torch.promote_types(calls.query.dtype, torch.float32)
    batch, heads, tokens, _ = calls.query.shape
    step = chunk or max(1, _SCRATCH // (batch * heads * tokens))
    keys = calls.key.to(wide).transpose(-1, -2)
    received = torch.zeros(batch, tokens, dtype=wide, device=keys.device)
    for start in range(0, tokens, step):
        scores = calls.query[:, :, start : start + step].to(wide) @ keys * calls.scale
        if calls.mask is not None:
            rows = slice(start, start + step) if calls.mask.shape[-2] > 1 else slice(None)
            scores = scores + calls.mask[..., rows, :].to(wide)
        received = received + scores.softmax(-1).sum(-2).mean(1)
    return received


__all__ = ["attention_received", "received_by"]
