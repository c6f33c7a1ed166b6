"""What is measured of a ControlNet on held-out images: does it use the hint, and does it help the base?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.objectives.controlnet import ControlNetObjective
from diffusers_repr.training.batches import to_device

PLACES = (0.2, 0.4, 0.6, 0.8)  # in the range of timesteps


class HintErrors:
    """Denoising errors with the true hint, with that of another image, with the null hint, and of the base alone.

    Of the same noise for all four, which draws of its own do not change from step to step.

    Args:
        objective: That trains the ControlNet.
        data: The split, its images as they are.
        images: How many of them, the first.
        batch_size: Images of a forward; 2 or more, as another's hint is the next one's in the batch.
        seed: Of the noise.

    Raises:
        ValueError: For fewer than two images.
    """

    def __init__(
        self, objective: ControlNetObjective, data: TrainData, images: int, batch_size: int = 32, seed: int = 0
    ) -> None:
        self.objective, self.data, self.batch_size, self.seed = objective, data, max(batch_size, 2), seed
        self.count = min(images, len(data))
        if self.count < 2:
            raise ValueError("`eval_split` compares the hints of images with one another; it needs two images.")

    @torch.no_grad()
    def __call__(self, controlnet: nn.Module, step: int) -> dict[str, float]:
        """`eval_hint`, `eval_other_hint`, `eval_null_hint` and `eval_no_hint`: mean squared errors."""
        device = next(controlnet.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        low, high = self.objective.denoiser.schedule.timestep_range
        sums: dict[str, float] = {}
        seen = 0
        rows = torch.utils.data.Subset(self.data, range(self.count))
        for given in DataLoader(rows, self.batch_size):
            batch = self.data.on_device({key: to_device(value, device) for key, value in given.items()})
            batch["generator"] = generator
            x0 = self.objective.clean(batch)
            if len(x0) < 2:
                continue  # there is no other image
            hints = self.objective.hints(batch["masks"])
            none = torch.ones(len(x0), dtype=torch.bool, device=device)
            shown: dict[str, Tensor | None] = {
                "hint": hints, "other_hint": hints.roll(1, 0), "null_hint": self.objective.hints(batch["masks"], none),
                "no_hint": None,
            }  # fmt: skip
            for place in PLACES:
                batch["time"] = torch.full((len(x0),), round(low + place * (high - low)), device=device)
                noisy = self.objective.noised(batch, x0, drop=False)
                for name, hint in shown.items():
                    error = (self.objective.predict_with(controlnet, noisy, hint) - noisy.target).square()
                    sums[name] = sums.get(name, 0.0) + float(error.mean((1, 2, 3)).sum()) / len(PLACES)
            seen += len(x0)
        found = {f"eval_{name}": value / seen for name, value in sums.items()}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["PLACES", "HintErrors"]
