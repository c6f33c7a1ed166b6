"""How good are samples of 8x8 digits? Fréchet distance and class accuracy by a classifier of the real ones.

    python examples/studies/digits_metrics.py --seed 0

Images are (N, 1, 8, 8), float, in [0, 1]: what a pipeline returns by `output_type="pt"`. The classifier is trained on
the 997 training digits, the reference of the distance too; the 800 others give its accuracy and that floor.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.transforms import augment

CLASSES = 10
AUGMENTATION = {"flip": False, "rotation": 10.0, "shift": 0.0875, "scale": 0.1}  # that of ddim_digits_class.yaml
EPOCHS, BATCH_SIZE, LEARNING_RATE, LABEL_SMOOTHING = 60, 64, 2e-3, 0.05
DRAWS = 5
CHUNK = 1024


@functools.cache
def real_digits(*splits: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,) of one or more splits; read once, so do not write into them."""
    digits = load_digits_splits()
    images = np.stack([np.array(image) for split in splits for image in digits[split]["image"]])
    labels = [label for split in splits for label in digits[split]["label"]]
    return torch.from_numpy(images)[:, None].float() / 255, torch.tensor(labels)


@functools.cache
def augmented_digits(*splits: str) -> Tensor:
    """Each image of the splits by `DRAWS` draws of the augmentation, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_variants(real_digits(*splits)[0].repeat(DRAWS, 1, 1, 1))


def random_variants(images: Tensor) -> Tensor:
    return ((augment(2 * images - 1, **AUGMENTATION) + 1) / 2).clamp(0, 1)


class DigitsClassifier(nn.Module):
    """A small convolutional network, (N, 1, 8, 8) in [0, 1] to 10 logits over 64 features."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, self.num_features),
            nn.GELU(),
        )
        self.head = nn.Linear(self.num_features, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.body(2 * images - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Encoder(nn.Module):
    """The classifier's features in float64, in the form torchmetrics asks for."""

    def __init__(self, network: DigitsClassifier) -> None:
        super().__init__()
        self.network, self.num_features = network, network.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images).double()


class DigitsJudge:
    """Judges samples of the digits by a trained classifier."""

    def __init__(self, network: DigitsClassifier) -> None:
        self.network = network.eval().requires_grad_(False)
        self._metrics: dict[str, nn.Module] = {}

    @classmethod
    def train(cls, seed: int = 0, epochs: int = EPOCHS) -> "DigitsJudge":
        """Train the classifier on the training digits; the global random state stays as it is."""
        images, labels = real_digits("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DigitsClassifier()
            optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
            steps = epochs * -(-len(images) // BATCH_SIZE)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(images)).split(BATCH_SIZE):
                    logits = network(random_variants(images[rows]))
                    F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
        return cls(network)

    def save(self, path: str | Path) -> None:
        """Write the classifier's weights to a safetensors file."""
        save_file(self.network.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> "DigitsJudge":
        """Read what `save` wrote."""
        network = DigitsClassifier()
        network.load_state_dict(load_file(path))
        return cls(network)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class ids (N,) of images."""
        images = check_images(images)
        return torch.cat([self.network(chunk).argmax(1) for chunk in images.split(CHUNK)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) of images in float64, the input of the classifier's last layer."""
        images, encoder = check_images(images), Encoder(self.network)
        return torch.cat([encoder(chunk) for chunk in images.split(CHUNK)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose predicted class is the asked one."""
        predicted, labels = self.predict(images), torch.as_tensor(labels)
        if labels.shape != predicted.shape:
            raise ValueError(f"{len(predicted)} images need as many labels, got {tuple(labels.shape)}.")
        return float((predicted == labels.cpu()).double().mean())

    def _metric(self, reference: str) -> nn.Module:
        """The metric with the statistics of a reference, taken once."""
        if reference in self._metrics:
            return self._metrics[reference]
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ImportError('The distance comes with torchmetrics: pip install "diffusers-repr[eval]"') from error
        metric = FrechetInceptionDistance(feature=Encoder(self.network), reset_real_features=False)
        with torch.no_grad():
            metric.update(real_digits("train")[0] if reference == "train" else augmented_digits("train"), real=True)
        self._metrics[reference] = metric
        return metric

    @torch.no_grad()
    def frechet_distance(self, images: Tensor, reference: Literal["train", "augmented"] = "train") -> float:
        """Distance of images to real ones, between Gaussians fitted to their features (Heusel et al. 2017).

        `reference` is the training digits as they are, or augmented, which is what a generator of the recipe learns:
        guidance that undoes the augmentation comes closer to the first and goes away from the second. With N images
        a distance is biased up by a share that falls as 1 / N: compare rows of equal N.
        """
        if reference not in ("train", "augmented"):
            raise ValueError(f"`reference` is train or augmented, got {reference!r}.")
        images = check_images(images)
        if len(images) <= self.network.num_features:
            raise ValueError(f"A distance needs more than {self.network.num_features} images, got {len(images)}.")
        metric = self._metric(reference)
        metric.reset()  # leaves the statistics of the reference
        for chunk in images.split(CHUNK):
            metric.update(chunk, real=False)
        return float(metric.compute())

    def floor(self, reference: Literal["train", "augmented"] = "train") -> float:
        """Distance of the validation and test digits together (800), treated alike, to the reference."""
        splits = ("validation", "test")
        images = real_digits(*splits)[0] if reference == "train" else augmented_digits(*splits)
        return self.frechet_distance(images, reference)

    def report(self) -> dict[str, float]:
        """Accuracy on each split of the real digits, the floors, and how far the references are from each other."""
        splits = {split: real_digits(split) for split in ("train", "validation", "test")}
        accuracies = {f"{split}_accuracy": self.accuracy(*pair) for split, pair in splits.items()}
        return accuracies | {
            "frechet_distance_floor": self.floor(),
            "frechet_distance_floor_augmented": self.floor("augmented"),
            "frechet_distance_of_augmented_to_train": self.frechet_distance(augmented_digits("train")),
        }


def check_images(images: Tensor) -> Tensor:
    """The images as float32 on the CPU, if they are what this module measures."""
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8) or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"Images are (N, 1, 8, 8) and float, got {tuple(images.shape)} and {images.dtype}.")
    images = images.detach().float().cpu()
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"Images lie in [0, 1], got {low:.3g} to {high:.3g}; from [-1, 1] by (images / 2 + 0.5).")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the classifier")
    judge = DigitsJudge.train(parser.parse_args().seed)
    print(json.dumps({name: round(value, 4) for name, value in judge.report().items()}, indent=2))


if __name__ == "__main__":
    main()
