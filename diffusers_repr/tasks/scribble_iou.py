"""Mean IoU of a network that is trained on scribbles, on held-out images whose every pixel has a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.metrics.miou import ConfusionMatrix
from diffusers_repr.objectives.scribble import ScribbleObjective
from diffusers_repr.training.batches import to_device


class ScribbleIoU:
    """Mean IoU, over one confusion matrix of a split, and the accuracy of its pixels.

    Args:
        objective: That trains the network.
        data: The split, its images as they are, its masks the true ones.
        batch_size: Images of a forward.
    """

    def __init__(self, objective: ScribbleObjective, data: TrainData, batch_size: int = 32) -> None:
        self.objective, self.data, self.batch_size = objective, data, batch_size

    @torch.no_grad()
    def __call__(self, network: nn.Module, step: int) -> dict[str, float]:
        """`eval_mean_iou` and `eval_pixel_accuracy`."""
        device = next(network.parameters()).device
        matrix = ConfusionMatrix(len(self.objective.class_names), self.objective.ignore_index)
        for given in DataLoader(self.data, self.batch_size):
            batch = self.data.on_device({k: to_device(v, device) for k, v in given.items() if isinstance(v, Tensor)})
            matrix.update(self.objective.segmenter.predict(batch["pixel_values"], network), batch["masks"])
        found = {"eval_mean_iou": matrix.mean_iou(), "eval_pixel_accuracy": matrix.accuracy()}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["ScribbleIoU"]
