"""`AutoencoderErrors`: what the code of a diffusion autoencoder is worth, on held-out images while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from diffusers_repr.data import TrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.heads.fitting.protocols import PROTOCOLS
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives import DiffusionAutoencoderObjective
from diffusers_repr.sweep import few_shot_probe
from diffusers_repr.tasks.reconstruction import measure_reconstruction

SHOTS = 5  # labels a class of the probe
# Of so few numbers as a short code has, weaker penalties have no optimum that is reached.
PROTOCOL = PROTOCOLS["lbfgs"].replace(l2=(1.0, 1e-1, 1e-2, 1e-3))
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps, at which the noise is estimated


class AutoencoderErrors:
    """Reconstructions, the denoising error with the own and another code, and a probe of five labels a class.

    Args:
        objective: That trains it, before its first step.
        train_set: Images as they are, whose labels the probe learns from.
        test_set: Those that are reconstructed and probed.
        images: How many are reconstructed, the first.
        steps: Of DDIM, both ways.
        seed: Of noise and draws.
    """

    def __init__(
        self,
        objective: DiffusionAutoencoderObjective,
        train_set: TrainData,
        test_set: TrainData,
        images: int = 64,
        steps: int = 50,
        seed: int = 0,
    ) -> None:
        self.objective, self.sets = objective, (train_set, test_set)
        self.images, self.steps, self.seed = min(images, len(test_set)), steps, seed
        state = {name: value.clone() for name, value in objective.state_dict().items()}
        self.untrained = objective.artifacts()[0].parts[0].build(state)

    @torch.no_grad()
    def __call__(self, pipe: Any, step: int) -> dict[str, float]:
        """The numbers by name; `mse_mean_image` is the error of the training images' mean."""
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self.objective.denoiser.device)
        pixels = self.pixels(self.sets[1])[: self.images]
        found = {**self.reconstructions(pipe, pixels), **self.denoising(pipe, pixels)}
        labels = [getattr(data, "labels", None) for data in self.sets]
        if all(one is not None and (one >= 0).all() for one in labels):
            found |= self.probes(pipe.encoder, [torch.as_tensor(one) for one in labels])
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found

    def pixels(self, data: TrainData, count: int | None = None) -> Tensor:
        """Images `(N, C, H, W)` in [-1, 1], on the CPU."""
        rows = Subset(data, range(len(data) if count is None else count))
        return torch.cat([to_unit(batch["pixel_values"]) for batch in DataLoader(rows, 256)])

    def reconstructions(self, pipe: Any, pixels: Tensor) -> dict[str, float]:
        """As `measure_reconstruction`, and `mse_mean_image`."""
        images, mean = pixels / 2 + 0.5, to_mean(self.pixels(self.sets[0]))
        found = measure_reconstruction(pipe, images, steps=self.steps, seed=self.seed)
        return {**found, "mse_mean_image": float((images - mean).square().mean())}

    def denoising(self, pipe: Any, pixels: Tensor) -> dict[str, float]:
        """Error of the noise with the own code, with another image's, and of a frozen base with none."""
        denoiser, draws = pipe.denoiser, torch.Generator().manual_seed(self.seed)
        x0 = denoiser.encode_pixels(pixels.to(pipe.device)).float()
        code = pipe.encode(pixels / 2 + 0.5, None).code
        low, high = denoiser.schedule.timestep_range
        codes = {"own": code, "permuted": code.roll(1, 0)} | ({"base": None} if pipe.gradient is not None else {})
        errors: dict[str, list[Tensor]] = {name: [] for name in codes}
        for place in LEVELS:
            level = denoiser.level(NoiseLevel(timestep=round(low + place * (high - low))))
            noise = torch.randn(x0.shape, generator=draws).to(x0)
            x_t = denoiser.add_noise(x0, level, noise)
            with denoiser.evaluating():
                for name, one in codes.items():
                    eps = denoiser.predict(x_t, level, pipe.condition(one, len(x0))).eps
                    errors[name].append((eps - noise).square().mean())
        return {f"denoising_{name}": float(torch.stack(values).mean()) for name, values in errors.items()}

    def probes(self, encoder: nn.Module, labels: list[Tensor]) -> dict[str, float]:
        """Accuracy of linear probes on five labels a class: of codes, of the untrained encoder's, of pixels."""
        sets = [self.pixels(data) for data in self.sets]
        found = {}
        for name, network in (("code", encoder), ("untrained", self.untrained), ("pixels", None)):
            train, test = (_codes(network, part) for part in sets)
            score = few_shot_probe(train, labels[0], test, labels[1], SHOTS, protocol=PROTOCOL, seed=self.seed)
            found[f"{name}_{SHOTS}_shot"] = score.mean
        return found


def to_mean(pixels: Tensor) -> Tensor:
    """The mean image `(C, H, W)`, in [0, 1]."""
    return pixels.mean(0) / 2 + 0.5


def _codes(network: nn.Module | None, pixels: Tensor) -> Tensor:
    if network is None:
        return pixels.flatten(1)
    like = next(network.parameters())
    with eval_mode(network):
        return torch.cat([network(part.to(like)).code.float().cpu() for part in pixels.split(512)])


__all__ = ["AutoencoderErrors"]
