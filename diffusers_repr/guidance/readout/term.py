"""`ReadoutTerm`: the summed loss of what heads read, and the step that one or several `ReadoutGuidance` make on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import GradientRequest
from diffusers_repr.guidance.energy import EnergyTerm, check_update
from diffusers_repr.guidance.readout.base import Comparison, head_readout, seen_levels
from diffusers_repr.guidance.readout.reference import read_reference
from diffusers_repr.heads import MapHead


class Readout(Protocol):
    """One head, and what its readouts are compared with: a `ReadoutGuidance`."""

    @property
    def head(self) -> MapHead:
        """What reads."""

    @property
    def reference(self) -> Tensor | None:
        """Clean x_0 that is read at each level, or None."""

    @property
    def seed(self) -> int:
        """Of the reference's noise."""

    @property
    def weight(self) -> float:
        """Factor of its loss."""

    @property
    def published(self) -> bool:
        """Whether it is read as the published code does."""

    @property
    def comparison(self) -> Comparison:
        """What readouts are compared with."""


class ReadoutTerm(EnergyTerm):
    """The loss of readouts; with a clean `reference`, a pass of its own that reads it at the same level.

    Args:
        config: Whose step it is: scale, interval, update, steps, published, checkpoint.
        denoiser: The model.
        parts: The readouts.

    Raises:
        ValueError: For a head of another base, and checkpointing that the model lacks.
    """

    def __init__(self, config: Any, denoiser: Denoiser, parts: Sequence[Readout]) -> None:
        heads: list[Any] = [part.head for part in parts]
        for head in heads:
            head.check_base(denoiser)
        request = GradientRequest(
            self._loss,
            tuple(dict.fromkeys(path for head in heads for path in head.config["layers"])),
            update=config.update,
            checkpoint=config.checkpoint,
            modules=tuple(dict.fromkeys(heads)),
            both=config.published,
            steps=config.steps,
        )
        interval = config.interval or seen_levels(denoiser.schedule, *heads)
        super().__init__(config.replace(interval=interval), denoiser, request)
        self.parts = list(parts)
        # Readouts of clean references at the level of the call: (part, first row of the half of the batch) -> map.
        self._references: dict[tuple[int, int], Tensor] = {}

    def prepare(self, call: NetworkCall, forward: Callable[[dict[str, Any]], Any]) -> None:
        """Read the references, noised to the level of the call."""
        for at, part in enumerate(self.parts):
            if part.reference is not None:
                self._references[at, call.batch.cond.start] = read_reference(
                    part.reference, part.head, self.denoiser, call, part.seed, forward, published=part.published
                )

    def _loss(self, features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        for at, part in enumerate(self.parts):
            read = head_readout(part.head, features, call, x, published=part.published)
            reference = self._references.get((at, call.batch.cond.start))
            total = total + part.weight * part.comparison.loss(read, reference, x)
        return total


def latent_update(update: str | None, steps: int, *, published: bool) -> str:
    """The checked `update` of a readout guidance, None being that of its kind.

    Raises:
        ValueError: For an unknown one, less than one step, and several steps or the published form of `eps`.
    """
    update = update or ("latent_adam" if published else "latent_sign")
    check_update(update)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1; got {steps!r}.")
    if update == "eps" and (steps > 1 or published):
        raise ValueError("update='eps' makes no steps on the latents: leave steps=1 and published=False.")
    return update
