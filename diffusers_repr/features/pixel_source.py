"""`PixelSource`: raw pixels where tasks take features, the baseline of every table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.source import BaseFeatureSource, SourceArguments
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.files import read_json, write_json
from diffusers_repr.hub.schema import boolean, integer, record
from diffusers_repr.noise import NoiseLevel

PIXELS = "pixels"
_SETTINGS = record({"patch": integer(1, 999), "places": boolean(), "centred": boolean()})


class PixelSource(BaseFeatureSource):
    """A feature source without a network: each pixel, with what is around it or where it lies; the layer `pixels`.

    Args:
        denoiser: Tells how images become numbers, and their size; its network is not run.
        patch: Side of the square of pixels around each, odd, mirrored at the border; 1: the pixel alone.
        places: Add where it lies, y and x from -1 to 1.
        centred: Take away the mean of each patch.
        image_size: As in `FeatureExtractor`.

    Raises:
        ValueError: For an even patch, and a single pixel that is to be centred.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> PixelSource(Denoiser(unet, DDPMScheduler()), patch=3)(torch.rand(2, 1, 8, 8))["pixels"].shape
        torch.Size([2, 9, 8, 8])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        patch: int = 1,
        *,
        places: bool = False,
        centred: bool = False,
        image_size: ImageSize = None,
    ) -> None:
        if check_whole("patch", patch) % 2 == 0:
            raise ValueError(f"patch is the odd side of a square around a pixel; got {patch}.")
        if centred and patch == 1:
            raise ValueError("centred=True of a single pixel leaves nothing; take patch=3 or more.")
        self.denoiser, self.layers = denoiser, [PIXELS]
        self.patch, self.places, self.centred = patch, places, centred
        self.image_size: tuple[int, int] | Literal["keep"] = denoiser.resize_to(image_size) or "keep"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the settings, as `config.json`; `from_pretrained` reads them."""
        settings = {"patch": self.patch, "places": self.places, "centred": self.centred}
        write_json(Path(folder) / "config.json", settings)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        base: Denoiser,
        *,
        image_size: ImageSize = None,
        batch_size: int | None = None,
    ) -> PixelSource:
        """Read what `save_pretrained` wrote.

        Args:
            folder: With a `config.json`.
            base: Tells how images become numbers.
            image_size: As the class.
            batch_size: As of every source; it changes nothing.

        Raises:
            ValueError: If the file is damaged.
        """
        return cls(base, **_SETTINGS(read_json(Path(folder) / "config.json"), "config.json"), image_size=image_size)

    def from_pixels(self, pixels: Tensor, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """The pixels, `(B, C patch patch (+ 2), H, W)` float32; what conditions a network changes nothing.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            **arguments: As of every source.
        """
        count, _, height, width = pixels.shape
        found = pixels
        if self.patch > 1:
            around = functional.pad(pixels, [self.patch // 2] * 4, mode="reflect")
            found = functional.unfold(around, self.patch).view(count, -1, height, width)
        if self.centred:
            found = found - found.mean(1, keepdim=True)
        if self.places:
            y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
            found = torch.cat([found, torch.stack([y, x]).to(found).expand(count, -1, -1, -1)], 1)
        return FeatureOutput({PIXELS: found}, NoiseLevel(timestep=0), {}, None, (height, width))


__all__ = ["PIXELS", "PixelSource"]
