"""Mean IoU of a network that tells classes of pixels while it is trained, on held-out images with masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.metrics.miou import ConfusionMatrix
from diffusers_repr.training.batches import to_device


class PixelIoU:
    """Mean IoU, over one confusion matrix of a split, and the accuracy of its pixels.

    Args:
        predict: Class ids `(B, H, W)` of images `(B, C, H, W)` in [-1, 1] and the network that is measured.
        num_classes: Of pixels.
        data: The split, its images as they are, its masks the true ones.
        ignore_index: Id of pixels of no class.
        batch_size: Images of a forward.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, nn.Module], Tensor],
        num_classes: int,
        data: TrainData,
        ignore_index: int = 255,
        batch_size: int = 32,
    ) -> None:
        self.predict, self.num_classes, self.data = predict, num_classes, data
        self.ignore_index, self.batch_size = ignore_index, batch_size

    @torch.no_grad()
    def __call__(self, network: nn.Module, step: int) -> dict[str, float]:
        """`eval_mean_iou` and `eval_pixel_accuracy`."""
        device = next(network.parameters()).device
        matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
        for given in DataLoader(self.data, self.batch_size):
            batch = self.data.on_device({k: to_device(v, device) for k, v in given.items() if isinstance(v, Tensor)})
            matrix.update(self.predict(batch["pixel_values"], network), batch["masks"])
        found = {"eval_mean_iou": matrix.mean_iou(), "eval_pixel_accuracy": matrix.accuracy()}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["PixelIoU"]
