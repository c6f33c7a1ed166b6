"""A judge of samples: features of a small residual network that learned the labels of the training images.

It is neither the teacher of an aligned model nor made as one, so that a model gains nothing by imitating it.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffusers_repr.data.transforms import augment
from diffusers_repr.hub import atomic_file


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """(B, C, H, W) in [-1, 1] to logits over pooled features."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for factor in (1, 2, 4):
            if factor > 1:
                layers.append(nn.Conv2d(width * factor // 2, width * factor, 3, stride=2, padding=1))
            layers += [Block(width * factor), Block(width * factor)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(4 * width, classes)

    def features(self, pixels: Tensor) -> Tensor:
        return self.body(pixels).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


def the_judge(path: Path, images: Tensor, labels: Tensor, device: torch.device, **settings) -> Judge:
    """The judge kept at `path`, trained and kept there by the first caller: one judge for all models."""
    if not path.is_file():
        trained = train_judge(images, labels, device, **settings)
        with atomic_file(path) as file:
            file.write(save(trained.state_dict()))
    judge = Judge(images.shape[1], int(labels.max()) + 1, settings["width"])
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval().requires_grad_(False)


def train_judge(images: Tensor, labels: Tensor, device: torch.device, *, flip: bool, steps: int, width: int) -> Judge:
    """A judge of uint8 images (N, C, H, W), with seed 0; the global random state stays."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Judge(images.shape[1], int(labels.max()) + 1, width).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        images, labels, since = images.to(device), labels.to(device), time.perf_counter()
        half = torch.bfloat16 if device.type == "cuda" else None
        for _ in range(steps):
            rows = torch.randint(len(images), (min(512, len(images) // 2),), device=device)
            pixels = augment(images[rows].float() / 127.5 - 1, flip, 10.0, 0.1, 0.1)
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = F.cross_entropy(model(pixels).float(), labels[rows], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    print(f"judge: {steps} steps in {time.perf_counter() - since:.0f} s, last loss {float(loss.detach()):.3f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judged(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and predicted ids (N,), on the CPU, of images (N, C, H, W), uint8 or in [0, 1]."""
    device = next(judge.parameters()).device
    features, predicted = [], []
    for part in images.split(1000):
        part = part.to(device)
        pixels = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float() * 2 - 1
        found = judge.features(pixels)
        features.append(found.float().cpu())
        predicted.append(judge.head(found).argmax(1).cpu())
    return torch.cat(features), torch.cat(predicted)
