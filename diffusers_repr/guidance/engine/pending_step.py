"""What a network call leaves for the further calls at its step, and for the scheduler's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.engine.network_call import FirstCall


@dataclass(eq=False)
class PendingStep:
    """From the first network call at a step of the sampler to that step.

    Attributes:
        first: The call.
        shift: Change of the latents, as the network takes them.
        moved: The same in the scheduler's form.
        correction: Change of the prediction that further calls get too.
        cond: The conditional prediction, where the null one is to come by a second call.
        waits: Whether CFG waits for that call.
        replacement: Prediction that the scheduler gets instead of what the pipeline makes.
    """

    first: FirstCall | None = None
    shift: Tensor | None = None
    moved: Tensor | None = None
    correction: Tensor | None = None
    cond: Tensor | None = None
    waits: bool = False
    replacement: Tensor | None = None

    def move(self, shift: Tensor, scale: float) -> None:
        """Move the latents by `shift` in what the network takes, `scale` times the scheduler's."""
        self.shift = shift if self.shift is None else self.shift + shift
        self.moved = self.shift / scale

    @property
    def pending(self) -> bool:
        """Whether the scheduler's step has something to take over."""
        return self.moved is not None or self.replacement is not None or self.waits

    def step_arguments(self, denoiser: Denoiser, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the scheduler's step, with the prediction and the latents that it is to take."""
        family = denoiser.family
        if self.replacement is not None:
            given = arguments["model_output"]
            arguments["model_output"] = family.sampler_value(given, self.replacement).to(given.dtype)
        if self.moved is not None:
            sample, rows = arguments["sample"], self.moved.shape[0]
            still = torch.zeros_like(sample[:rows], dtype=self.moved.dtype)
            moved = family.sampler_value(still, self.moved)  # in the scheduler's layout: Flux has tokens
            arguments["sample"] = sample + torch.cat([moved] * (sample.shape[0] // rows)).to(sample.dtype)
        return arguments
