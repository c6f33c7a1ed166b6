"""The images of conditions.py: the digits, or CIFAR-10; the encoder, what differs from the recipes, and the judge."""

import functools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from digits_metrics import DigitsJudge, real_digits
from judge import the_judge
from torch import Tensor

from diffusers_repr import frechet_distance
from diffusers_repr.data.image_data import load_images

MODELS = Path(__file__).parents[1] / "models"
SCHEDULER = json.dumps({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
DIGITS_U_NET = {
    "sample_size": 8, "in_channels": 1, "layers_per_block": 1, "block_out_channels": [32, 80],
    "down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2, "attention_head_dim": 16,
    "norm_num_groups": 8,
}  # fmt: skip
CIFAR_U_NET = {
    "sample_size": 32, "in_channels": 3, "layers_per_block": 1, "attention_head_dim": 16,
    "norm_num_groups": 8, "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}  # fmt: skip
CROSS = {"AttnDownBlock2D": "CrossAttnDownBlock2D", "AttnUpBlock2D": "CrossAttnUpBlock2D"}


def online_flags(u_net: dict[str, Any], batch_size: int) -> list[str]:
    """Of train_online.py, whose recipe has another network and pace: those of the other rows."""
    return ["--network", "UNet2DModel", "--model", json.dumps(u_net), "--scheduler", SCHEDULER, "--condition", "id",
            "--num_prototypes", "20", "--train_batch_size", str(batch_size), "--learning_rate", "1e-3",
            "--lr_scheduler", "cosine", "--ema_max_decay", "0.999", "--max_grad_norm", "1.0",
            "--label_dropout", "0.1"]  # fmt: skip


class Digits:
    """8x8 digits of scikit-learn, as the recipes have them: 997 to train on, 500 held out."""

    encoder = f"{MODELS / 'digits-ddpm'}:mid_block@100"
    images, steps, seeds = 500, 800, (0, 1, 2)

    def real(self, split: str) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels."""
        return real_digits(split)

    def flags(self, recipe: str) -> list[str]:
        """What differs from a recipe."""
        if recipe != "online":
            return []
        views = ["--random_rotation", "10", "--random_shift", "0.0875", "--random_scale", "0.1"]
        return [*online_flags(DIGITS_U_NET, 128), *views]

    def judge(self) -> DigitsJudge:
        """A classifier of the training digits."""
        return DigitsJudge.train()


class Cifar10:
    """10,000 training images of CIFAR-10.

    Args:
        folder: With its Parquet files.
        work: For the chosen images and the judge.
        encoder: `MODEL:layer@timestep`.
    """

    images, steps, seeds, batch_size, limit = 500, 2000, (0,), 12, 10_000

    def __init__(self, folder: str, work: Path, encoder: str | None) -> None:
        self.folder, self.work = folder, work
        self.encoder = encoder or f"{MODELS / 'cifar10-ddpm'}:mid_block@50"
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def data(self) -> Path:
        """Folder of the chosen images."""
        made = self.work / "data"
        if not (made / "test.parquet").is_file():
            made.mkdir(parents=True, exist_ok=True)
            for split, count in (("train", self.limit), ("test", self.images)):
                self._open(split).shuffle(seed=0).select(range(count)).to_parquet(made / f"{split}.parquet")
        return made

    def _open(self, split: str) -> datasets.Dataset:
        data = load_images(self.folder, split)
        kept = {data.image_column: "image", data.label_column: "label"}
        return data.dataset.select_columns(list(kept)).rename_columns({k: v for k, v in kept.items() if k != v})

    def real(self, split: str) -> tuple[Tensor, Tensor]:
        """See `Digits`."""
        if split not in self._read:
            self._read[split] = self._tensors(split)
        return self._read[split]

    def _tensors(self, split: str) -> tuple[Tensor, Tensor]:
        rows = datasets.load_dataset("parquet", data_files=str(self.data / f"{split}.parquet"), split="train")
        images = np.stack([np.array(image.convert("RGB")) for image in rows["image"]])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.tensor(rows["label"])

    def flags(self, recipe: str) -> list[str]:
        """See `Digits`: another network, the data, flips in place of turns and shifts, smaller batches."""
        batch = ["--train_batch_size", str(self.batch_size)]
        if recipe == "rcg_representation":
            return ["--dataset_name", str(self.data)]
        own = ["--dataset_name", str(self.data), "--random_rotation", "0", "--random_shift", "0"]
        own += ["--random_scale", "0", "--random_flip", "true"]
        if recipe == "online":
            return [*own, *online_flags(CIFAR_U_NET, self.batch_size)]
        if recipe == "perceptual":
            return [*own, *batch]
        model = dict(CIFAR_U_NET)
        if recipe in ("knn", "rdm"):
            for kind in ("down_block_types", "up_block_types"):
                model[kind] = [CROSS.get(name, name) for name in CIFAR_U_NET[kind]]
            model |= {"attention_head_dim": 4, "out_channels": 3}  # the first is the number of heads
        return [*own, *batch, "--model", json.dumps(model)]

    def judge(self) -> "CifarJudge":
        """A classifier of the chosen training images."""
        return CifarJudge(self)


class CifarJudge:
    """What `DigitsJudge` is for the digits."""

    def __init__(self, case: Cifar10) -> None:
        images, labels = case.real("train")
        pixels = (images * 255).to(torch.uint8)
        how = {"flip": True, "steps": 800, "width": 16}
        self.network = the_judge(case.work / "judge.safetensors", pixels, labels, torch.device("cpu"), **how)
        self.real = self.features(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of images in [0, 1], float64."""
        return torch.cat([self.network.features(2 * part - 1) for part in images.split(256)]).double()

    def frechet_distance(self, images: Tensor) -> float:
        """From the training images."""
        return frechet_distance(self.real, self.features(images))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that it takes for their class."""
        return float((self.network.head(self.features(images).float()).argmax(1) == labels).double().mean())
