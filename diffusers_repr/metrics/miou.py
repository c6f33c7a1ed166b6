"""Mean intersection over union of segmentations, over one confusion matrix of a whole data set."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole

Counting = Literal["masked", "legacy"]


class ConfusionMatrix:
    """How many pixels of each true class were predicted as each class; images are added one after another.

    Two ways of counting are made of it, of the same pixels:

    - `masked`: pixels without a true class count nowhere; the mean runs over the classes that occur in the truth (as
      detectron2 does, and torchmetrics' `MulticlassJaccardIndex` where no class is predicted that never occurs).
    - `legacy`: as the code of DDPM-Seg (arXiv 2112.03126): a prediction on a pixel without a true class still counts
      in the union, and a class that neither occurs nor is predicted scores 0. The mean runs over all classes.

    Args:
        num_classes: K; class ids are 0 to K - 1.
        ignore_index: Id in the truth of pixels of no class. It may be one of 0 to K - 1, and is then no class.

    Attributes:
        counts: `(K + 1, K)` int64, true class by predicted class; the last row is of pixels of no class.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> matrix = ConfusionMatrix(2, ignore_index=255)
        >>> matrix.update([[0, 1], [1, 1]], [[0, 1], [0, 255]])
        >>> matrix.iou("legacy").tolist(), matrix.iou("masked").tolist()
        ([0.4999999975, 0.3333333322222222], [0.5, 0.5])
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.num_classes, self.ignore_index = check_whole("num_classes", num_classes), ignore_index
        self.counts = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64)

    def update(self, predicted: Any, truth: Any) -> None:
        """Add predictions and truth of the same shape: tensors, arrays or lists of whole numbers.

        Raises:
            ValueError: For unequal shapes, and ids that are no classes.
        """
        found, true = (torch.as_tensor(x).detach().cpu() for x in (predicted, truth))
        if found.shape != true.shape:
            raise ValueError(
                f"The prediction is {tuple(found.shape)}, the truth {tuple(true.shape)}; give equal ones."
            )
        if found.is_floating_point() or true.is_floating_point():
            raise ValueError(
                f"Class ids are whole numbers; got {found.dtype} and {true.dtype}. Take the argmax first."
            )
        found, true, last = found.flatten().long(), true.flatten().long(), self.num_classes
        ignored = torch.zeros_like(true, dtype=torch.bool) if self.ignore_index is None else true == self.ignore_index
        for name, ids in (("prediction", found), ("truth", true[~ignored])):
            wrong = ids[(ids < 0) | (ids >= last)]
            if len(wrong):
                more = "" if self.ignore_index is None else f", and ignore_index={self.ignore_index} in the truth"
                raise ValueError(f"The {name} has the id {int(wrong[0])}; classes are 0 to {last - 1}{more}.")
        true = true.masked_fill(ignored, last)
        self.counts += torch.bincount(true * last + found, minlength=(last + 1) * last).view(last + 1, last)

    def iou(self, counting: Counting = "masked") -> Tensor:
        """`(K,)` float64; NaN for what is no class, and with `masked` for classes that do not occur in the truth.

        Args:
            counting: `masked` or `legacy`.

        Raises:
            ValueError: For another word.
        """
        if counting not in get_args(Counting):
            raise ValueError(f"counting={counting!r}; expected one of {', '.join(get_args(Counting))}.")
        classes = self.counts[:-1].double()
        hits, true = classes.diagonal(), classes.sum(1)
        told = self.counts.double().sum(0) if counting == "legacy" else classes.sum(0)
        union = true + told - hits
        iou = hits / (union + 1e-8) if counting == "legacy" else torch.where(true > 0, hits / union, torch.nan)
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            iou[self.ignore_index] = torch.nan
        return iou

    def mean_iou(self, counting: Counting = "masked") -> float:
        """The mean over classes; see `iou`.

        Raises:
            ValueError: If no pixel with a class was added.
        """
        if not int(self.counts[:-1].sum()):
            raise ValueError("No pixel has a true class, so there is nothing to measure; all were ignored.")
        return float(self.iou(counting).nanmean())

    def accuracy(self) -> float:
        """Share of the pixels with a true class that are predicted right.

        Raises:
            ValueError: If there is none.
        """
        classes = self.counts[:-1].double()
        if not float(classes.sum()):
            raise ValueError("No pixel has a true class, so there is nothing to measure; all were ignored.")
        return float(classes.diagonal().sum() / classes.sum())


def mean_iou(
    predicted: Any,
    truth: Any,
    num_classes: int,
    ignore_index: int | None = None,
    counting: Counting = "masked",
) -> float:
    """Mean intersection over union of predictions that are all at hand; see `ConfusionMatrix`.

    Args:
        predicted: Class ids, `(N, H, W)` or of any other shape.
        truth: Of the same shape.
        num_classes: K.
        ignore_index: Id in the truth of pixels of no class.
        counting: `masked` or `legacy`.

    Raises:
        ValueError: As `ConfusionMatrix`.

    Example:
        >>> mean_iou([0, 1, 1, 1], [0, 1, 0, 255], 2, ignore_index=255)
        0.5
    """
    matrix = ConfusionMatrix(num_classes, ignore_index)
    matrix.update(predicted, truth)
    return matrix.mean_iou(counting)


__all__ = ["ConfusionMatrix", "Counting", "mean_iou"]
