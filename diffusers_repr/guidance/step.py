"""`GuidedStep`: the outputs of one network call, and what terms may ask for on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, without_rows
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction, output_difference

# (a network, its keyword inputs) -> its first output; counted as a pass and a lane
Forward = Callable[[nn.Module, dict[str, Any]], Any]


class GuidedStep:
    """One network call of a pipeline, after its own pass: what a term makes its correction of.

    Attributes:
        call: The call.
        cond: Prediction for the conditional rows, `(B, C, H, W)`, in the network's own form and float32 or wider.
        null: Prediction for the null rows, or None.
        lanes: Name of a lane -> its prediction.
        level: Noise level.
        schedule: The noise process; `schedule.output` is the form of predictions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        call: NetworkCall,
        cond: Tensor,
        null: Tensor | None,
        lanes: dict[str, Tensor],
        forward: Forward,
    ) -> None:
        self.denoiser, self.schedule, self.call = denoiser, schedule, call
        self.cond, self.null, self.lanes, self._forward = cond, null, lanes, forward

    @property
    def level(self) -> NoiseLevel:
        """Noise level of the call."""
        return self.call.level

    def x(self, rows: slice) -> Tensor:
        """What the network took in these rows, in float32 or wider."""
        return widened(self.call.x[rows])

    def prediction(self, output: Tensor, x: Tensor) -> Prediction:
        """All forms of a prediction."""
        return Prediction(output, x, self.level, self.schedule)

    def run(
        self,
        rows: slice,
        x: Tensor | None = None,
        model: nn.Module | None = None,
        condition: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """One more evaluation: rows of the call, with another input or by another network.

        Args:
            rows: Of the call.
            x: What the network takes instead, `(rows, C, H, W)`; cast to the network's dtype.
            model: Another network that takes the same inputs.
            condition: Other inputs besides x_t and the timestep, by name.

        Returns:
            The prediction `(rows, C, H, W)` in float32 or wider.
        """
        call, family = self.call, self.denoiser.family
        inputs = index_batch(call.inputs, call.rows, rows, without_rows(family))
        own = call.x[rows]
        if condition is not None:
            inputs = family.with_condition(inputs, condition)
        if x is not None:
            inputs = family.with_sample(inputs, x.to(own.dtype))
        raw = self._forward(self.denoiser.model if model is None else model, inputs)
        return widened(family.output(raw, own))

    def difference(self, output: Tensor, other: Tensor, offset: Tensor) -> Tensor:
        """Change of `output` equal to `eps(x) - eps(x~)`, `other` being the prediction at `x~ = x + alpha offset`."""
        return output_difference(output, other, offset, self.level, self.schedule.output, self.schedule.sigma_data)


def widened(value: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
