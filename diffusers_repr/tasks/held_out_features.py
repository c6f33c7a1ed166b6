"""What is measured on held-out images while features are trained: key points found again, and sturdiness to noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from diffusers_repr.data import TrainData
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.metrics.pck import correct_points, pck
from diffusers_repr.objectives import CleanDIFTObjective, HyperfeaturesObjective, noise_robustness
from diffusers_repr.training.batches import to_device
from diffusers_repr.training.seeds import reseed

ALPHA = 0.1
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # in the range of timesteps
DRAWS = 8


class PairAccuracy:
    """PCK at a tenth of the longer side on held-out pairs: of the head, untrained too, of single layers, of pixels.

    Args:
        objective: That trains the head, before its first step.
        data: Pairs.
        pairs: How many of them, the first.
        seed: Of moved pairs.
    """

    def __init__(self, objective: HyperfeaturesObjective, data: TrainData, pairs: int, seed: int) -> None:
        self.objective, self.data, self.seed = objective, data, seed
        self.pairs = min(pairs, len(data))
        self.untrained = copy.deepcopy(objective.head).eval()

    @torch.no_grad()
    def __call__(self, head: nn.Module, step: int) -> dict[str, float]:
        """`pck`, `untrained_pck`, `pixels_pck` (patches of 5 x 5), and `layer_pck`, the best layer and level alone.

        The latter is chosen on the very pairs that it is measured on, which speaks for it.
        """
        device, size = self.objective.denoiser.device, self.objective.size
        correct: dict[str, list[Tensor]] = {}
        for batch in self.batches():
            moved = self.data.on_device(to_device(batch, device))
            images = moved["images"].flatten(0, 1)
            read = self.objective.maps(images)
            maps = {f"{path} {place}": level for path, levels in read.items() for place, level in enumerate(levels)}
            maps |= {"pck": head.to(device)(read), "untrained_pck": self.untrained.to(device)(read)}
            maps["pixels_pck"] = patches(images)
            for name, both in maps.items():
                for first, second, points, valid in zip(
                    *both.chunk(2), moved["points"].transpose(0, 1), moved["valid"], strict=True
                ):
                    ours, truth = points[0][valid], points[1][valid]
                    found = CosineMap(second, size).best(sample_map(first, ours, size)).points
                    correct.setdefault(name, []).append(correct_points(found, truth, max(size), ALPHA))
        scores = {name: pck(found, ALPHA).per_point for name, found in correct.items()}
        own = {name: scores.pop(name) for name in ("pck", "untrained_pck", "pixels_pck")}
        return _told({**own, "layer_pck": max(scores.values())})

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The first pairs, each batch moved by draws of its own seed."""
        for at, batch in enumerate(DataLoader(Subset(self.data, range(self.pairs)), 16)):
            reseed(self.seed, at, 0)
            yield batch


class FeatureRobustness:
    """How near features are to what noise leaves of them; see `noise_robustness`.

    Args:
        objective: That tunes the network.
        data: Images.
        images: How many of them, the first.
        seed: Of the noise.
    """

    def __init__(self, objective: CleanDIFTObjective, data: TrainData, images: int, seed: int) -> None:
        self.objective, self.data, self.seed = objective, data, seed
        self.images = min(images, len(data))

    @torch.no_grad()
    def __call__(self, pipe: object, step: int) -> dict[str, float]:
        """`clean_cosine`, `adapted_cosine`, `noisy_cosine` and `base_cosine`, of the base's own clean features."""
        objective = self.objective
        slot = next(iter(objective.trained_components()))
        tuned: nn.Module = getattr(pipe, slot)
        device, (low, high) = objective.denoiser.device, objective.denoiser.schedule.timestep_range
        batch = next(iter(DataLoader(Subset(self.data, range(self.images)), self.images)))
        reseed(self.seed, step, 0)
        pixels = self.data.on_device(to_device(batch, device))["pixel_values"]
        x0 = objective.denoiser.encode_pixels(pixels)
        noise = torch.randn(DRAWS + 1, *x0.shape, device=device)
        times = torch.tensor([low + place * (high - low) for place in PLACES])
        if objective.denoiser.schedule.kind == "vp":
            times = times.round()
        found: dict[str, float] = {}
        for network, names in (
            (tuned.to(device), ("clean", "adapted", "noisy")),
            (objective.teacher.model, ("base",)),
        ):
            measured = noise_robustness(objective, network, pixels, times, noise)
            found |= {f"{name}_cosine": float(measured[name if name != "base" else "clean"].mean()) for name in names}
        return _told(found)


def patches(images: Tensor, side: int = 5) -> Tensor:
    """The pixels around each pixel, `(B, C side side, H, W)`; 0 beyond the edge."""
    h, w = images.shape[2:]
    return functional.unfold(images, side, padding=side // 2).unflatten(2, (h, w))


def _told(found: dict[str, float]) -> dict[str, float]:
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


__all__ = ["ALPHA", "FeatureRobustness", "PairAccuracy"]
