"""`ClusteringLoss`: prototypes learned on a layer of the network, balanced over the batch (online guidance)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_repr.assign import SinkhornAssigner, clustering_loss
from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.denoiser.family import Family
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation, full_precision, widen


class ClusteringLoss(AuxiliaryLoss):
    """`-mean_b 1[low < t_b < high] sum_k Q_bk log softmax(S_b / temperature)_k` (arXiv 2312.08825, its code).

    S are the assigner's scores of a layer's tokens, Q their balanced assignments over the whole batch of all
    processes; the mean too is over the whole batch, so that few noise levels count for little.

    Args:
        layer: Path of the layer.
        weight: Of the loss, after `warmup_steps`.
        window: `(low, high)`, share of the time, 0 the data and 1 the noise.
        warmup_steps: Optimizer steps in which the weight grows from 0.
        detach: Whether the network is left alone.
        patches: Whether every patch is assigned, or the image.
        temperature: Of the softmax.
        epsilon: Of `sinkhorn_knopp`.
        iterations: Of `sinkhorn_knopp`.

    Attributes:
        assigner: Given by the objective, which trains it.

    Raises:
        ValueError: For an empty window.
    """

    assigner: SinkhornAssigner

    def __init__(
        self,
        layer: str,
        weight: float = 1.0,
        *,
        window: tuple[float, float] = (0.1, 0.2),
        warmup_steps: int = 0,
        detach: bool = True,
        patches: bool = False,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
    ) -> None:
        super().__init__("clustering", weight)
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"window is (low, high) in [0, 1], 0 the data and 1 the noise; got {window}.")
        self.layers, self.window, self.warmup_steps = (layer,), window, warmup_steps
        self.detach, self.patches = detach, patches
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    @property
    def current_weight(self) -> float:
        """Grows from 0 through the first steps."""
        return self.weight * (min(1.0, self.step / self.warmup_steps) if self.warmup_steps else 1.0)

    def attach(self, host: LossHost) -> None:
        """Keep what tells times and tokens.

        Raises:
            ValueError: For a schedule without bounded time (EDM, VE).
        """
        schedule = host.denoiser.schedule
        if schedule.kind in ("edm", "ve"):
            raise ValueError(f"A {schedule.kind} schedule has no time in [0, 1] to take noise levels by.")
        self.__dict__["family"], self.range = host.denoiser.family, schedule.timestep_range

    def forward(self, seen: Observation) -> Tensor:
        """The unweighted loss."""
        tokens = summary_tokens(seen.layers[self.layers[0]], self.__dict__["family"], self.patches)
        tokens = tokens.detach() if self.detach else tokens
        with full_precision(tokens.device):
            scores = self.assigner.scores(widen(tokens).flatten(0, -2))
            each = clustering_loss(scores, self.epsilon, self.iterations, self.temperature)
        each = each.unflatten(0, tokens.shape[:-1]).flatten(1).mean(1)
        low, high = self.range
        time = (torch.as_tensor(seen.noisy.level.timestep, device=each.device).float() - low) / (high - low)
        inside = (time > self.window[0]) & (time < self.window[1])
        return torch.where(inside, each, 0.0).mean()

    def describe(self) -> dict[str, Any]:
        """With the settings."""
        names = ("warmup_steps", "detach", "patches", "temperature", "epsilon", "iterations")
        return {**super().describe(), "window": [*self.window], **{name: getattr(self, name) for name in names}}


def summary_tokens(found: FeatureMap, family: Family, patches: bool) -> Tensor:
    """What is clustered of a layer: the image's tokens `(B, N, D)`, or one of the whole image `(B, 1, D)`.

    Args:
        found: The layer's output.
        family: Tells whether a class token stands in it.
        patches: Whether every patch is assigned.
    """
    place = family.class_token_at()
    if patches:
        return found.tokens()
    if place is not None and not found.is_map and found.values.shape[-2] > found.tokens().shape[-2]:
        return found.values[:, place, None]
    return found.tokens().mean(1, keepdim=True)


__all__ = ["ClusteringLoss", "summary_tokens"]
