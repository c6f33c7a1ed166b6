"""`AuxiliaryLosses`: the auxiliary losses of one objective, and what they read of its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn

from diffusers_repr.capture.persistent import PersistentCapture
from diffusers_repr.objectives.artifacts import ModelArtifact
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation
from diffusers_repr.objectives.base import weighted_sum


class AuxiliaryLosses(nn.ModuleDict):
    """Losses by name, in order; layers that several of them read are read once.

    Args:
        losses: Of different names.
        taken: Names that the objective itself logs.

    Attributes:
        capture: What stays on the network to read it; None where no loss reads a layer.

    Raises:
        TypeError: For what is no `AuxiliaryLoss`.
        ValueError: For two of one name.
    """

    def __init__(self, losses: Sequence[AuxiliaryLoss], taken: Sequence[str]) -> None:
        named: dict[str, AuxiliaryLoss] = {}
        for loss in losses:
            if not isinstance(loss, AuxiliaryLoss):
                raise TypeError(f"losses holds a {type(loss).__name__}; each must be an AuxiliaryLoss.")
            if loss.name in (*named, *taken):
                raise ValueError(f"Two losses are called {loss.name!r}; give one another name.")
            named[loss.name] = loss
        super().__init__(named)
        self.capture: PersistentCapture | None = None

    @property
    def each(self) -> dict[str, AuxiliaryLoss]:
        """The losses by name."""
        return {name: cast(AuxiliaryLoss, loss) for name, loss in self.items()}

    def attach(self, host: LossHost) -> None:
        """Attach every loss, and set the hooks for what they read.

        Raises:
            RuntimeError: If the network is compiled already.
        """
        losses = list(self.each.values())
        for loss in losses:
            loss.attach(host)
        layers = dict.fromkeys(path for loss in losses for path in loss.layers)
        attentions = dict.fromkeys(path for loss in losses for path in loss.attentions)
        if layers or attentions:
            self.capture = PersistentCapture(host.network, list(layers), list(attentions))

    def recording(self) -> AbstractContextManager[dict[str, Any]]:
        """A block that records the forward run inside, as `PersistentCapture.recording`."""
        return nullcontext({}) if self.capture is None else self.capture.recording()

    def teacher_attentions(self) -> dict[str, Sequence[int]]:
        """Name of an encoder -> its blocks whose attention is wanted now."""
        return {k: v for loss in self.each.values() if loss.active for k, v in loss.teacher_attentions.items()}

    def combine(self, losses: dict[str, Tensor], seen: Observation, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The weighted sum of the objective's own losses and of these, `loss`, beside all of them unweighted.

        Args:
            losses: The objective's own.
            seen: Of the same micro-batch.
            weights: Factor of each; 1 for those left out.
        """
        idle: list[Tensor] = []
        for name, loss in self.each.items():
            if loss.active:
                losses[name] = loss(seen)
            else:
                idle.append(loss.untouched().to(seen.prediction.device))
        out = weighted_sum(losses, weights)
        if idle:
            out["loss"] = out["loss"] + sum(idle)
        return out

    def kept_state(self, path: str) -> dict[str, Tensor]:
        """What the losses have a checkpoint keep besides their `state_dict`.

        Args:
            path: Of this module in the objective.
        """
        return {
            f"{path}.{name}.{key}": value
            for name, loss in self.each.items()
            for key, value in loss.kept_state().items()
        }

    def artifacts(self, path: str) -> list[ModelArtifact]:
        """The heads that the losses train; as trained, not averaged.

        Args:
            path: Of this module in the objective.
        """
        return [
            ModelArtifact(
                loss.get_submodule(place),
                f"{path}.{name}.{place}",
                loss.head_config(head),
                averaged=False,
                folder=f"heads/{head}",
            )
            for name, loss in self.each.items()
            for head, place in loss.head_modules().items()
        ]


__all__ = ["AuxiliaryLosses"]
