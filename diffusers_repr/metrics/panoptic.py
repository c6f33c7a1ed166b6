"""Panoptic quality of segmentations, counted by torchmetrics under the rules of COCO's own evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.hub.checks import check_whole


@dataclass(frozen=True, eq=False)
class PanopticScores:
    """Sums over a data set, class by class, `(K,)` each.

    Attributes:
        iou_sum: Of the matched segments, float64.
        true_positives: Matched pairs.
        false_positives: Predicted segments that match none.
        false_negatives: True segments that none matches.
    """

    iou_sum: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor

    def segmentation_quality(self) -> Tensor:
        """`(K,)` mean IoU of the matched pairs; 0 for a class without a match, NaN for one that never occurs."""
        return torch.where(self._occurs(), self.iou_sum / self.true_positives.clamp(min=1), torch.nan)

    def recognition_quality(self) -> Tensor:
        """`(K,)` F1 of the matching: TP / (TP + FP/2 + FN/2); NaN for a class that never occurs."""
        return self.true_positives / self._all()

    def panoptic_quality(self) -> Tensor:
        """`(K,)` sum of IoU / (TP + FP/2 + FN/2), the product of the two others; NaN for a class that never occurs."""
        return self.iou_sum / self._all()

    def mean(self, classes: Iterable[int] | None = None) -> float:
        """Panoptic quality, the mean over the classes that occur in truth or prediction.

        Args:
            classes: Among these alone: the things, say, or the classes never seen in training. All if None.

        Raises:
            ValueError: If none of them occurs.
        """
        chosen = self.panoptic_quality()
        chosen = chosen if classes is None else chosen[torch.as_tensor(list(classes), dtype=torch.long)]
        if not bool(chosen.isfinite().any()):
            raise ValueError("No segment of these classes is in truth or prediction, so there is nothing to measure.")
        return float(chosen.nanmean())

    def _occurs(self) -> Tensor:
        return self._all() > 0

    def _all(self) -> Tensor:
        return self.true_positives + self.false_positives.double() / 2 + self.false_negatives.double() / 2


def panoptic_quality(
    predicted: Iterable[PanopticMap], truth: Iterable[PanopticMap], num_classes: int
) -> PanopticScores:
    """Panoptic quality (Kirillov et al. 2019, arXiv 1801.00868, eq. 1) with the rules of `panopticapi`.

    A predicted and a true segment match if they are of one class and `IoU > 0.5`, with
    `union = |p| + |g| - |p and g| - |p and void|`. A crowd is never matched and never missed. A prediction that
    matches none and lies with more than half of its area on void, or on crowds of its class, is not counted.

    torchmetrics' `PanopticQuality` does the counting. It departs from these rules in two points: it knows no crowds,
    and it takes what is void in the *prediction* out of the union and forgives a true segment that lies mostly there.
    So it is given two classes more, whose counts are dropped: one for pixels without a predicted segment, one for
    crowds; and predictions on crowds that are not to count are taken out beforehand.

    Args:
        predicted: One an image.
        truth: One an image, of the same size.
        num_classes: K; classes are 0 to K - 1.

    Raises:
        ImportError: Without torchmetrics; names the extra.
        ValueError: For sizes or numbers that differ, classes that are none, and crowds in a prediction.

    Example:
        >>> true = PanopticMap(torch.tensor([[1, 1, 2, 2]]), {1: 0, 2: 1})
        >>> found = PanopticMap(torch.tensor([[1, 1, 2, 0]]), {1: 0, 2: 1})
        >>> panoptic_quality([found], [true], 2).panoptic_quality().tolist()  # half of the second: no match
        [1.0, 0.0]
    """
    count = check_whole("num_classes", num_classes)
    metric = _metric(count)
    for one, other in zip(predicted, truth, strict=True):
        _check(one, other, count)
        found = one.class_map(void=count)
        found[_on_crowds(one, other)] = count
        true = other.class_map(void=count + 2)  # torchmetrics takes a class that it does not know for void
        for crowd in other.crowds:
            true[other.ids == crowd] = count + 1
        pairs = (torch.stack([labels, ids], dim=-1)[None] for labels, ids in ((found, one.ids), (true, other.ids)))
        metric.update(*pairs)
    sums = (metric.iou_sum, metric.true_positives, metric.false_positives, metric.false_negatives)
    return PanopticScores(*(values[:count].detach().cpu() for values in sums))


def _metric(count: int) -> Any:
    try:
        from torchmetrics.detection import PanopticQuality
    except ImportError as error:
        raise ImportError('Panoptic quality needs torchmetrics: pip install "diffusers-repr[eval]"') from error
    # All are things to it: of stuff it would merge the segments of an image, which `panopticapi` does not.
    return PanopticQuality(things=set(range(count + 2)), stuffs=set())


def _on_crowds(predicted: PanopticMap, truth: PanopticMap) -> Tensor:
    """`(H, W)` boolean: predictions that match no segment and lie mostly on void and crowds of their class."""
    taken = torch.zeros_like(predicted.ids, dtype=torch.bool)
    void = truth.ids == 0
    for number, label in predicted.classes.items() if truth.crowds else ():
        here = predicted.ids == number
        alike = {other for other, own in truth.classes.items() if own == label}
        crowd = torch.isin(truth.ids, torch.tensor(sorted(alike & truth.crowds), dtype=torch.long))
        if 2 * int((here & (void | crowd)).sum()) <= int(here.sum()):
            continue
        masks = [truth.ids == other for other in alike - truth.crowds]
        if not any(2 * int((here & g).sum()) > int(((here & ~void) | g).sum()) for g in masks):
            taken |= here
    return taken


def _check(predicted: PanopticMap, truth: PanopticMap, count: int) -> None:
    if predicted.ids.shape != truth.ids.shape:
        sizes = (" x ".join(map(str, m.ids.shape)) for m in (predicted, truth))
        raise ValueError("The prediction is {}, the truth {}; bring them to one size.".format(*sizes))
    if predicted.crowds:
        raise ValueError("A prediction has crowds; only a truth may.")
    for name, segments in (("prediction", predicted), ("truth", truth)):
        wrong = [label for label in segments.classes.values() if label >= count]
        if wrong:
            raise ValueError(f"The {name} has the class {wrong[0]}; classes are 0 to {count - 1}.")


__all__ = ["PanopticScores", "panoptic_quality"]
