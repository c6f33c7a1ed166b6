"""Real images and their generated variants in one training set: which of them is shown when."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.data.base import TrainData, augmented, hashed
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.variants import read_variants
from diffusers_repr.store.image_store import ImageStore

Scheme = Literal["real", "synthetic", "append", "replace", "curriculum"]
_STREAM = 11  # of the draws, unlike those of the order


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Which images are shown; the fields are keys of a recipe.

    Raises:
        ValueError: For a scheme without variants, or variants that it would not show.
    """

    mixing: Scheme = setting(
        "real", "real, synthetic, append (both), replace (a share), or curriculum (replace, strength growing)"
    )
    synthetic_dirs: list[str] | None = setting(None, "variants of each image, of `diffusers-repr generate`")
    replace_probability: float = setting(0.5, "of replace and curriculum: share of images whose variant is shown")
    curriculum_epochs: int = setting(10, "of curriculum: epochs in which the strength grows to the highest")

    def __post_init__(self) -> None:
        if (self.mixing != "real") != bool(self.synthetic_dirs):
            raise ValueError(
                f"`mixing: {self.mixing}` {'needs' if self.mixing != 'real' else 'shows no'} variants; "
                f"{'name' if self.mixing != 'real' else 'drop'} `synthetic_dirs`."
            )
        if not 0 <= self.replace_probability <= 1:
            raise ValueError(f"`replace_probability` lies in [0, 1], got {self.replace_probability}.")
        if self.curriculum_epochs < 1:
            raise ValueError(f"`curriculum_epochs` must be at least 1, got {self.curriculum_epochs}.")
        if self.mixing == "curriculum" and len(self.synthetic_dirs or ()) < 2:
            raise ValueError("`mixing: curriculum` goes through strengths; name variants of two or more.")


class MixedTrainData(TrainData):
    """Images with masks, and variants of each that have its mask.

    - `real`: the images alone. `synthetic`: their variants alone, each once an epoch.
    - `append`: both, each once an epoch.
    - `replace`: every image once an epoch, in whose place a variant is shown with a probability; each draw is of the
      image and the epoch.
    - `curriculum`: as `replace`, and in epoch e of E variants of the strength number `min(e L // E, L - 1)` of L, the
      lowest first. The epoch comes with the index of a sample, so that it moves in whichever process reads it.

    Args:
        data: The images, with masks.
        config: The scheme.
        seed: Of the draws.

    Attributes:
        strengths: Of the variants, as they are shown; 0 where a store tells none.
        by_epoch: The loop gives `(epoch, index)`.

    Raises:
        FileNotFoundError, ValueError: As `read_variants`.
    """

    def __init__(self, data: ImageTrainData, config: MixingConfig, seed: int = 0) -> None:
        self.data, self.config, self.seed = data, config, seed
        self.by_epoch = config.mixing in ("replace", "curriculum")
        self.variants: list[Tensor] = []
        self.strengths: list[float] = []
        self._keys: list[str] = []
        if config.synthetic_dirs:
            pixels = torch.stack([data[index]["pixel_values"] for index in range(len(data))])
            stores = sorted((strength_of(folder), folder) for folder in config.synthetic_dirs)
            self.strengths = [strength for strength, _ in stores]
            self.variants = [read_variants(folder, pixels) for _, folder in stores]
            self._keys = [hashed(key.name.encode() for key in ImageStore.open(f).image_keys()) for _, f in stores]

    def __len__(self) -> int:
        count = len(self.data)
        made = sum(one.shape[1] for one in self.variants)
        return {"synthetic": count * made, "append": count * (1 + made)}.get(self.config.mixing, count)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """A sample, of the first epoch where none is given; `synthetic`: whether a variant is shown."""
        epoch, place = index if isinstance(index, tuple) else (0, index)
        if not 0 <= place < len(self):
            raise IndexError(f"Sample {place} of {len(self)}.")
        turn, row = divmod(place, len(self.data))
        sample = self.data[row]
        variant = self._chosen(epoch, row, turn)
        sample["synthetic"] = torch.tensor(variant is not None)
        return sample if variant is None else {**sample, "pixel_values": variant}

    def _chosen(self, epoch: int, row: int, turn: int) -> Tensor | None:
        """The variant that is shown; None for the image itself."""
        scheme = self.config.mixing
        if scheme == "real" or (scheme == "append" and turn == 0):
            return None
        every = self.variants
        if scheme in ("synthetic", "append"):
            turn -= scheme == "append"
            for one in every:
                if turn < one.shape[1]:
                    return one[row, turn]
                turn -= one.shape[1]
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch, row))
        if float(torch.rand((), generator=generator)) >= self.config.replace_probability:
            return None
        if scheme == "curriculum":
            every = [every[self.stage(epoch)]]
        own = torch.cat([one[row] for one in every])
        return own[int(torch.randint(len(own), (), generator=generator))]

    def stage(self, epoch: int) -> int:
        """Which of the strengths a curriculum shows in an epoch.

        Args:
            epoch: From 0.
        """
        return min(epoch * len(self.variants) // self.config.curriculum_epochs, len(self.variants) - 1)

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `TrainData`: variants are moved as images are."""
        return augmented(batch, self.data.config)

    def fingerprint(self) -> dict[str, Any]:
        """That of the images, and the keys of the variants."""
        return {**self.data.fingerprint(), "variants": self._keys}

    @property
    def class_names(self) -> list[str] | None:
        """See `TrainData`."""
        return self.data.class_names


def strength_of(folder: str) -> float:
    """The strength that the variants in a store were made with; 0 where it tells none.

    Args:
        folder: Of an `ImageStore`.

    Raises:
        FileNotFoundError, ValueError: For what is no store of images.
    """
    told = json.loads(ImageStore.open(folder).image_keys()[0].guidance or "{}")
    return float(told.get("strength", 0.0)) if isinstance(told, dict) else 0.0


def _mixed(seed: int, epoch: int, row: int) -> int:
    """One seed of three numbers, the same everywhere."""
    return int(hashed([f"{seed} {epoch} {row} {_STREAM}".encode()])[:15], 16)


__all__ = ["MixedTrainData", "MixingConfig", "Scheme", "strength_of"]
