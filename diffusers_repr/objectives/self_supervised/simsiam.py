"""`SimSiamObjective`: each view predicts the other, whose side of the loss gets no gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusers_repr.objectives.self_supervised.base import PredictingObjective, card_of, crossed_cosine, mlp


def simsiam_loss(predicted: tuple[Tensor, Tensor], projected: tuple[Tensor, Tensor]) -> Tensor:
    """`-cos(p1, stop(z2)) / 2 - cos(p2, stop(z1)) / 2`, mean over the batch (SimSiam's eq. 1 and 4); from -1 to 1.

    Args:
        predicted: p1 and p2, `(B, D)` each.
        projected: z1 and z2, `(B, D)` each; no gradient goes into them.
    """
    return -crossed_cosine(predicted, projected) / 2


class SimSiamObjective(PredictingObjective):
    """SimSiam (Chen and He 2020, arXiv 2011.10566): no negatives and no moving average; a predictor.

    Args:
        model: As `SelfSupervisedObjective`, and so are mean and std.
        mean: See there.
        std: See there.
        projection_dim: Width of the vectors that are compared.
        prediction_dim: Hidden width of the predictor; a quarter of `projection_dim`, as in the paper, if None.
        predictor_lr_scale: Learning rate of the predictor, times that of the rest. The paper has 1 for large networks;
            by 1 small ones unlearn here what they see untrained, by 10 they learn (docs/results/generated).
    """

    card = card_of("simsiam")

    def __init__(
        self,
        model: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        projection_dim: int = 128,
        prediction_dim: int | None = None,
        predictor_lr_scale: float = 10.0,
    ) -> None:
        super().__init__(model, mean, std, predictor_lr_scale=predictor_lr_scale)
        hidden = 2 * self.width
        self.projector = mlp(self.width, hidden, hidden, projection_dim, last_norm=True)
        self.predictor = mlp(projection_dim, prediction_dim or max(projection_dim // 4, 1), projection_dim)

    def compare(self, pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `simsiam_loss`."""
        one, two = pair
        return simsiam_loss((self.predictor(one), self.predictor(two)), pair)


__all__ = ["SimSiamObjective", "simsiam_loss"]
