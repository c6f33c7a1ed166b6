"""What a network call leaves for the further calls at its step, and for the scheduler's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser


class PendingStep:
    """From the first network call at a step of the sampler to that step.

    Args:
        call: The first call, as the pipeline made it; None before it, and where no scheduler is stepped.
        given: The tensor that holds its noisy input.

    Attributes:
        shift: Change of the latents, as the network takes them.
        moved: The same in the scheduler's form.
        correction: Change of the prediction that further calls get too.
        cond: The conditional prediction, where the null one is to come by a second call.
        waits: Whether CFG waits for that call.
        replacement: Prediction that the scheduler gets instead of what the pipeline makes.
    """

    def __init__(self, call: NetworkCall | None = None, given: Tensor | None = None) -> None:
        self.shift: Tensor | None = None
        self.moved: Tensor | None = None
        self.correction: Tensor | None = None
        self.cond: Tensor | None = None
        self.replacement: Tensor | None = None
        self.waits = False
        self.called = call is not None
        if call is not None and given is not None:
            x = call.x[call.batch.cond]
            self._first = call.samples, call.level.timestep, given, _version(given), x, _version(x)

    def is_followed_by(self, call: NetworkCall, given: Tensor) -> bool:
        """Whether a call takes the samples of the first one, at its level."""
        if not self.called:
            return False
        samples, timestep, first, version, x, x_version = self._first
        if call.rows != samples or call.level.timestep != timestep:
            return False
        if _version(first) != version or _version(x) != x_version:
            return False  # changed in place since
        if given is first and not given.is_inference():
            return True
        return call.x.shape == x.shape and torch.equal(call.x, x)

    def move(self, shift: Tensor, scale: float) -> None:
        """Move the latents by `shift` in what the network takes, `scale` times the scheduler's."""
        self.shift = shift if self.shift is None else self.shift + shift
        self.moved = self.shift / scale

    @property
    def is_due(self) -> bool:
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


def _version(value: Tensor) -> int:
    # torch's count of changes in place, private: without it, a loop that steps its latents in place would have its
    # next call taken for a further one at the same step. Tensors of inference mode have none.
    return 0 if value.is_inference() else value._version
