"""The reference of appearance and drag: a clean sample read at each level, or a row of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.guidance.energy import conditional_inputs
from diffusers_repr.guidance.readout.base import (
    Comparison,
    as_tensor,
    check_row,
    features_of,
    head_readout,
    without_row,
)
from diffusers_repr.guidance.step import widened
from diffusers_repr.heads import MapHead
from diffusers_repr.noise import add_noise


@dataclass(frozen=True, eq=False)
class ReferenceComparison(Comparison):
    """A comparison with the readout of a reference.

    Attributes:
        reference: Clean x_0 `(B or 1, C, h, w)`, or None.
        reference_row: The sample of the batch that is the reference, or None.
    """

    reference: Any = None
    reference_row: int | None = None
    needs: ClassVar[tuple[str, ...]] = ("reference or reference_row",)

    def __post_init__(self) -> None:
        if self.reference is not None:
            self._set("reference", _reference(self.reference))
        check_row(self.reference_row)

    def loss(self, read: Tensor, reference: Tensor | None, x: Tensor) -> Tensor:
        """The distance from the reference; 0 for the row that is the reference itself."""
        row = self.reference_row
        if row is None:
            assert reference is not None
            return self.distance(read, reference, x)
        own = read[min(row, len(read) - 1)][None].detach().expand_as(read)
        return without_row(self.distance(read, own, x), row)

    def distance(self, read: Tensor, reference: Tensor, x: Tensor) -> Tensor:
        """One number a sample, `(B,)`."""
        raise NotImplementedError


def read_reference(
    reference: Tensor,
    head: MapHead,
    denoiser: Denoiser,
    call: NetworkCall,
    seed: int,
    forward: Callable[..., Any],
    *,
    published: bool = False,
) -> Tensor:
    """Readout of a reference that is noised to the level of a call, under the conditions of its conditional rows."""
    x = _noised(reference, call, seed)
    inputs = conditional_inputs(denoiser, call, x)
    module: Any = head
    with torch.no_grad(), eval_mode(module):
        features = features_of(denoiser.model, head.config["layers"], lambda: forward(inputs))
        maps = {path: denoiser.feature_map(path, value, call.size).as_map() for path, value in features.items()}
        return head_readout(head, maps, call, widened(x), published=published)


def _noised(reference: Tensor, call: NetworkCall, seed: int) -> Tensor:
    like = call.x[call.batch.cond]
    if len(reference) not in (1, len(like)) or reference.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"reference is {tuple(reference.shape)}; the samples' x_0 is {tuple(like.shape)}. Give one for all "
            "samples, or one each, of their size; images become x_0 by denoiser.encode(images)."
        )
    noise = torch.randn(1, *like.shape[1:], generator=torch.Generator().manual_seed(seed))
    x0 = widened(reference.to(like.device)).expand(like.shape)
    return add_noise(x0, call.level, noise.to(x0).expand(like.shape)).to(like.dtype)


def _reference(value: Any) -> Tensor:
    """As `(B, C, h, w)`."""
    found = as_tensor("reference", value)
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4:
        raise ValueError(f"reference must be x_0, (C, h, w) or (B, C, h, w); got {tuple(found.shape)}.")
    return found
