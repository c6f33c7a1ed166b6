"""`BYOLObjective`: each view predicts what a moving average of the network sees in the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffusers_repr.objectives.auxiliary.self_teacher import SelfTeacher
from diffusers_repr.objectives.self_supervised.base import PredictingObjective, card_of, crossed_cosine, mlp


def byol_loss(predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """`2 - 2 cos(q1, z2) + 2 - 2 cos(q2, z1)`, mean over the batch (BYOL's eq. 2, both ways); from 0 to 8.

    Args:
        predicted: q1 and q2 of the network, `(B, D)` each.
        target: z1 and z2 of its moving average, `(B, D)` each; no gradient goes into them.
    """
    return 4 - 2 * crossed_cosine(predicted, target)


def target_decay(base: float, step: int, steps: int | None) -> float:
    """Decay of the target after a step: `1 - (1 - base) (cos(pi step / steps) + 1) / 2`; `base` without `steps`.

    Example:
        >>> [round(target_decay(0.99, step, 100), 4) for step in (0, 50, 100)]
        [0.99, 0.995, 1.0]
    """
    if steps is None:
        return base
    return 1 - (1 - base) * (math.cos(math.pi * min(step / steps, 1)) + 1) / 2


class BYOLObjective(PredictingObjective):
    """BYOL (Grill et al. 2020, arXiv 2006.07733): no negatives; the target is an average of encoder and projector.

    A checkpoint holds the target. It is apart from the run's moving average, which is what is saved.

    Args:
        model: As `SelfSupervisedObjective`, and so are mean and std.
        mean: See there.
        std: See there.
        projection_dim: Width of the vectors that are compared.
        prediction_dim: Hidden width of the predictor; that of the projector if None.
        predictor_lr_scale: Learning rate of the predictor, times that of the rest. The paper has 1 for large networks;
            by 1 small ones unlearn here what they see untrained, by 10 they learn (docs/results/generated).
        decay: Of the target at the first step.
        steps: Of the run, over which the decay rises to 1 as a cosine; None: it stays.
    """

    card = card_of("byol")

    def __init__(
        self,
        model: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        projection_dim: int = 128,
        prediction_dim: int | None = None,
        predictor_lr_scale: float = 10.0,
        decay: float = 0.99,
        steps: int | None = None,
    ) -> None:
        super().__init__(model, mean, std, predictor_lr_scale=predictor_lr_scale)
        self.decay, self.steps, self._used = decay, steps, False
        hidden = 2 * self.width
        self.projector = mlp(self.width, hidden, projection_dim)
        self.predictor = mlp(projection_dim, prediction_dim or hidden, projection_dim)
        self.target = {name: SelfTeacher(getattr(self, name), decay) for name in ("encoder", "projector")}
        for name, part in self.target.items():
            self.freeze(f"target.{name}", part.module)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Projections of the target; the norms in it go by the batch in hand, as in training."""
        self._used = True
        encoder, projector = (cast(Any, self.target[name].module) for name in ("encoder", "projector"))
        parts = self.parts(encoder, images)
        return [(projector(one), projector(two)) for one, two in (part.chunk(2) for part in parts)]

    def compare(self, pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `byol_loss`."""
        assert target is not None
        one, two = pair
        return byol_loss((self.predictor(one), self.predictor(two)), target)

    def on_step_end(self, step: int, ema: Any) -> None:
        """Move the target; not where a checkpoint has just been read, which holds it."""
        if self._used:
            for name, part in self.target.items():
                part.decay = target_decay(self.decay, step, self.steps)
                part.update(getattr(self, name))
        self._used = False

    def trained_state(self) -> dict[str, Tensor]:
        """With the target, which is no part of the result."""
        held = {f"target.{name}.{key}": value for name, part in self.target.items()
                for key, value in part.state_dict().items()}  # fmt: skip
        return {**super().trained_state(), **held}


__all__ = ["BYOLObjective", "byol_loss", "target_decay"]
