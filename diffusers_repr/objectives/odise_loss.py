"""The loss of masks and classes of queries: matched one to one with the truth, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.hub.checks import check_whole

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
_NAMES = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}


def query_targets(truth: Sequence[PanopticMap], device: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """For each image its segments' masks, `(n, H, W)` float32, and classes, `(n,)`; crowds are left out.

    Raises:
        ValueError: For an image without a segment.
    """
    masks, classes = [], []
    for at, one in enumerate(truth):
        ids = [number for number in one.classes if number not in one.crowds]
        if not ids:
            raise ValueError(f"Image {at} of the batch has no segment to learn; leave such images out.")
        masks.append(torch.stack([one.ids == number for number in ids]).float().to(device))
        classes.append(torch.tensor([one.classes[number] for number in ids], device=device))
    return masks, classes


class QueryLoss:
    """The loss of Mask2Former (arXiv 2112.01527), by transformers' own: matching, and three terms for every layer.

    The class's cross-entropy over all queries, those without a match as background at a tenth of the weight; for the
    matched ones the binary cross-entropy of the mask and its Dice loss, at points that are drawn where the mask is
    uncertain.

    Args:
        classes: K.
        points: Drawn for each mask.
        weights: Of the terms; ODISE's if None.
        no_object: Weight of the background's class.

    Raises:
        ValueError: For numbers out of range.
    """

    def __init__(
        self, classes: int, points: int = 12_544, weights: dict[str, float] | None = None, no_object: float = 0.1
    ) -> None:
        self.weights = {**WEIGHTS, **(weights or {})}
        if set(self.weights) != set(WEIGHTS):
            raise ValueError(f"weights are of {', '.join(WEIGHTS)}; got {', '.join(self.weights)}.")
        config = Mask2FormerConfig(
            num_labels=check_whole("classes", classes), train_num_points=check_whole("points", points),
            class_weight=self.weights["class"], mask_weight=self.weights["mask"], dice_weight=self.weights["dice"],
            no_object_weight=no_object,
        )  # fmt: skip
        self._loss = Mask2FormerLoss(config, dict(self.weights))

    def __call__(
        self, masks: Sequence[Tensor], logits: Sequence[Tensor], truth: Sequence[PanopticMap]
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            masks: Logits `(B, Q, h, w)` of each layer.
            logits: `(B, Q, K + 1)` of each layer, the background last.
            truth: One an image, of any size.

        Returns:
            `loss`, and its terms `class`, `mask` and `dice`, detached, unweighted, each summed over the layers.
        """
        device = masks[-1].device
        targets = query_targets(truth, device)
        loss = self._loss.to(device)
        sums = dict.fromkeys(WEIGHTS, masks[-1].new_zeros(()))
        with torch.autocast(device.type, enabled=False):
            for mask, logit in zip(masks, logits, strict=True):
                found = loss(mask.float(), logit.float(), *targets)
                sums = {name: total + found[_NAMES[name]] for name, total in sums.items()}
        total = torch.stack([self.weights[name] * value for name, value in sums.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in sums.items()}}


__all__ = ["WEIGHTS", "QueryLoss", "query_targets"]
