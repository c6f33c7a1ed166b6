"""`AuxiliaryLoss`: one loss beside the denoising loss, on layers that are read in the same forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser, FeatureMap
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.teachers import Teachers


@dataclass(frozen=True)
class Observation:
    """What a loss may look at: one micro-batch after the network's forward.

    Attributes:
        noisy: Input, level, target and condition.
        prediction: Of the network, float32.
        layers: Layer path -> tokens of the image, with their graph.
        attention: Attention path -> queries and keys `(B, heads, N, d)`.
        teachers: Features of the encoders.
    """

    noisy: NoisyBatch
    prediction: Tensor
    layers: Mapping[str, FeatureMap]
    attention: Mapping[str, tuple[Tensor, Tensor]]
    teachers: Teachers


class LossHost(Protocol):
    """What a loss asks of the objective it is attached to; `DiffusionObjective` is one.

    Attributes:
        denoiser: What is trained.
        network: Its network.
        encoders: Frozen teachers by name.
        losses: All auxiliary losses by name; those before in order are attached already.
    """

    denoiser: Denoiser
    network: nn.Module
    encoders: dict[str, Any]

    @property
    def losses(self) -> nn.ModuleDict:
        """See the class."""

    def layer(self, path: str) -> Layer:
        """Channels and grid of a layer."""

    def layer_tokens(self, path: str, value: Tensor, size: tuple[int, int]) -> FeatureMap:
        """What a layer returned, as tokens of the image; `size` is (H, W) of x_0."""

    def freeze(self, name: str, module: Any) -> Any:
        """Keep a module that is used and not trained."""


class AuxiliaryLoss(nn.Module):
    """Base of losses beside the denoising loss. Subclass: set `layers` or `attentions` by `attach`, write `forward`.

    Args:
        name: In the log.
        weight: Factor in the loss.
        stop_step: Optimizer steps after which the loss is left out; None: never.

    Attributes:
        layers: Paths that `Observation.layers` must hold.
        attentions: Paths that `Observation.attention` must hold.
        teacher_attentions: Name of an encoder -> its blocks whose attention `Observation.teachers` must give.
        reads_pixels: Whether it needs what only the images of a batch give.
        runs_network: Whether it runs a network of the same kind by itself, on the image and the condition alone.

    Raises:
        ValueError: For a weight that is negative or not finite, or a step that is negative.
    """

    layers: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    teacher_attentions: Mapping[str, Sequence[int]] = {}
    reads_pixels: bool = False
    runs_network: bool = False

    def __init__(self, name: str, weight: float, stop_step: int | None = None) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"The weight of {name!r} must be finite and not negative; got {weight}.")
        if stop_step is not None and stop_step < 0:
            raise ValueError(f"stop_step of {name!r} counts optimizer steps; got {stop_step}.")
        self.name, self.weight, self.stop_step, self.step = name, weight, stop_step, 0

    @property
    def active(self) -> bool:
        """Whether the loss still counts."""
        return self.stop_step is None or self.step < self.stop_step

    @property
    def current_weight(self) -> float:
        """Factor in the loss of the coming step; `weight` where no schedule changes it."""
        return self.weight

    def attach(self, host: LossHost) -> None:
        """Called once, when the objective is made: find layers, build what is trained."""

    def forward(self, seen: Observation) -> Tensor:
        """The unweighted loss, a scalar in float32 or wider."""
        raise NotImplementedError

    def on_step_end(self, step: int, ema: Any) -> None:
        """As `Objective.on_step_end`; also called when a run is resumed."""
        self.step = step

    def kept_state(self) -> dict[str, Tensor]:
        """Tensors besides those of `state_dict` that a checkpoint keeps and writes back in place, by name."""
        return {}

    def head_modules(self) -> dict[str, str]:
        """Models to be saved beside the pipeline: name of the folder -> path in this loss."""
        return {}

    def head_config(self, name: str) -> dict[str, Any]:
        """Entries of the saved config of one of `head_modules` that tell what it was trained with."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Settings that decide the result, as JSON."""
        return {"weight": self.weight, "stop_step": self.stop_step, "layers": [*self.layers, *self.attentions]}

    def untouched(self) -> Tensor:
        """0, with a graph to all its parameters: keeps DDP content while the loss is left out."""
        parts = [parameter.sum() for parameter in self.parameters() if parameter.requires_grad]
        return 0 * torch.stack(parts).sum() if parts else torch.zeros(())


def full_precision(device: torch.device) -> Any:
    """A block outside of any autocast: losses are made in float32 or wider."""
    return torch.autocast(device.type, enabled=False)


def widen(value: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def widen_inputs(value: Any) -> Any:
    """Arguments of a network in float32 or wider."""
    if isinstance(value, Mapping):
        return {name: widen_inputs(part) for name, part in value.items()}
    return widen(value) if isinstance(value, Tensor) and value.is_floating_point() else value


__all__ = ["AuxiliaryLoss", "LossHost", "Observation", "full_precision", "widen", "widen_inputs"]
