"""What a dry run takes for granted of data and networks that are not on this disk, without asking any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from diffusers_repr.data.base import TrainData
from diffusers_repr.objectives.teachers import CachedFeatures

# Channels of the tokens of the vision transformers that are aligned with, by the size that their names tell.
_WIDTHS = {"small": 384, "base": 768, "large": 1024, "huge": 1280, "giant": 1536}
# The autoencoder of Stable Diffusion 1, `stabilityai/sd-vae-ft-mse` and `-ema`.
_SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def is_here(name: str | None) -> bool:
    """Whether a run needs no network for it: nothing, data that come with a package, or a path on this disk."""
    return name in (None, "none", "digits") or Path(str(name)).expanduser().exists()


def assumed_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, on the meta device: 4 channels, 8 pixels to one of the latents."""
    with torch.device("meta"):
        return AutoencoderKL(**_SD_VAE)


def assumed_encoder(name: str, size: tuple[int, int]) -> CachedFeatures:
    """An encoder by its name: a token for every 16 x 16 pixels, channels by the size that it names, else 768.

    Args:
        name: Hub id or folder.
        size: (H, W) of the images.
    """
    dim = next((width for word, width in _WIDTHS.items() if word in name.lower()), _WIDTHS["base"])
    return CachedFeatures(Path(name).name, dim, (max(size[0] // 16, 1), max(size[1] // 16, 1)))


class AssumedData(TrainData):
    """Two samples of zeros that stand for the data of a run.

    Args:
        shape: Of x_0, (C, H, W): pixels, or latents.
        classes: Number of classes; 0: no labels.
        encoders: Whose features each sample has.
        latent: Whether `shape` is that of latents.
        image_size: (H, W) of the images that the features are of.
        assumed: What was taken for granted, a line each, for `describe_run`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        encoders: Sequence[Any],
        *,
        latent: bool,
        image_size: tuple[int, int],
        assumed: Sequence[str] = (),
    ) -> None:
        self.shape, self.classes, self.encoders, self.latent = tuple(shape), classes, tuple(encoders), latent
        self.image_size, self.assumed = image_size, tuple(assumed)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        channels, *grid = self.shape
        sample: dict[str, Any] = {"index": torch.tensor(index)}
        if self.latent:
            sample["moments"] = torch.zeros(2 * channels, *grid)
        else:
            sample["pixel_values"] = torch.zeros(*self.shape)
        if self.classes:
            sample["class_labels"] = torch.tensor(0)
        for encoder in self.encoders:
            tokens = torch.zeros(_count(encoder.grid_for(self.image_size)), encoder.dim)
            sample.setdefault("features", {})[encoder.name] = tokens
            sample.setdefault("features_global", {})[encoder.name] = tokens[0]
        return sample

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As it is."""
        return dict(batch)

    def fingerprint(self) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    @property
    def class_names(self) -> list[str] | None:
        """Numbers."""
        return [str(number) for number in range(self.classes)] or None


def _count(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


__all__ = ["AssumedData", "assumed_encoder", "assumed_vae", "is_here"]
