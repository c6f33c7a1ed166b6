"""`Hyperfeatures`: a head and its base as a feature source, for every task that reads features."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.features.noise_policy import image_keys
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.source import BaseFeatureSource, SourceArguments
from diffusers_repr.heads.hyperfeature_maps import walk_levels, walk_maps
from diffusers_repr.heads.hyperfeatures import HYPERFEATURES, HyperfeaturesHead
from diffusers_repr.hub import resolve_folder
from diffusers_repr.hub.checks import check_whole

_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")


class Hyperfeatures(BaseFeatureSource):
    """Images to one map of descriptors, the layer `hyperfeatures`; a `FeatureSource`.

    Nothing is drawn: images are inverted along their own trajectory, so a feature depends on neither ids nor seeds.
    The head goes where its base is.

    Args:
        denoiser: The base of the head.
        head: From `HyperfeaturesHead.for_base`, or trained.
        image_size: As in `FeatureExtractor`; None: that of the head, else the base's own.
        batch_size: Images inverted at a time; None for all at once.
        output_device: Where features are kept; the model's device if None.

    Raises:
        ValueError: For a base that is not the head's, and sizes that do not suit it.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> denoiser = Denoiser(unet, DDPMScheduler())
        >>> head = HyperfeaturesHead.for_base(denoiser, steps=10, reads=[0, 5], width=8, bottleneck=4)
        >>> Hyperfeatures(denoiser, head)(torch.rand(3, 1, 8, 8))["hyperfeatures"].shape
        torch.Size([3, 8, 8, 8])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        head: HyperfeaturesHead,
        *,
        image_size: ImageSize = None,
        batch_size: int | None = None,
        output_device: str | torch.device | None = None,
    ) -> None:
        require_images(denoiser, "Hyperfeatures")
        head.check_base(denoiser)
        self.denoiser, self.head = denoiser, head.eval()
        self.layers = [HYPERFEATURES]
        config = head.config
        own = None if config["image_size"] is None else (int(config["image_size"][0]), int(config["image_size"][1]))
        chosen = own if image_size is None else image_size
        self.image_size: tuple[int, int] | Literal["keep"] = denoiser.resize_to(chosen) or "keep"
        self.batch_size = None if batch_size is None else check_whole("batch_size", batch_size)
        self.output_device = torch.device(output_device) if output_device is not None else None
        self.levels = walk_levels(denoiser.schedule, config["steps"], head.reads, config["clean_timestep"])
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}
        self._prompts: dict[Any, dict[str, Any]] = {}

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Any = None,
        *,
        revision: str | None = None,
        base_revision: str | None = None,
        token: str | None = None,
        **settings: Any,
    ) -> Hyperfeatures:
        """Load a saved head with its base.

        Args:
            id_or_folder: What training or `save_pretrained` wrote, or a Hub id of it.
            base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded base.
            revision: Of the head on the Hub.
            base_revision: Of the base on the Hub.
            token: Hub token.
            **settings: Further arguments of the class.

        Raises:
            FileNotFoundError: If the base is a folder that is not here.
            ValueError: If it is another base, or the head tells none.
        """
        folder = resolve_folder(id_or_folder, revision, token, _PATTERNS)
        head = HyperfeaturesHead.from_pretrained(folder)
        head.to(torch.float32)
        return cls(_opened(head, folder, base, revision=base_revision, token=token), head, **settings)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the head, which names its base; `from_pretrained` reads both."""
        self.head.save_pretrained(folder)

    @torch.no_grad()
    def from_pixels(self, pixels: Tensor, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """As a call, from `(B, C, H, W)` in [-1, 1]; `image_size` is not applied.

        Args:
            pixels: See above.
            **arguments: As of every source: the head's prompt if none is given; `ids` are checked, nothing is drawn.
        """
        denoiser, count, size = self.denoiser, len(pixels), tuple(pixels.shape[2:])
        given: dict[str, Any] = dict(arguments)
        ids = given.pop("ids", None)
        if ids is not None:
            image_keys(ids, pixels)
        if all(value is None for value in given.values()):
            given["prompt"] = self.head.config["prompt"] or None
        condition = denoiser.condition(**given, batch=count, size=size, cache=self._prompts)
        parts = []
        for start in range(0, count, self.batch_size or count):
            rows = range(start, min(start + (self.batch_size or count), count))
            x0 = denoiser.encode_pixels(pixels[rows.start : rows.stop])
            parts.append(self.descriptors(x0, condition.take(list(rows)), size).to(self.output_device or x0.device))
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            raise FloatingPointError(
                f"The hyperfeatures of {type(denoiser.model).__name__} ({denoiser.dtype}) are NaN or infinite. Load "
                "the model in float32 or bfloat16."
            )
        read = self.levels[self.head.reads[0]]
        return FeatureOutput({HYPERFEATURES: features}, read, {}, None, (size[0], size[1]))

    @torch.no_grad()
    def descriptors(self, x0: Tensor, condition: Mapping[str, Any], size: tuple[int, ...]) -> Tensor:
        """H of `x_0`, one weighted sum that grows while the images are inverted; no map is kept.

        Args:
            x0: `(B, C, h, w)`.
            condition: Network inputs for the rows.
            size: (H, W) of the images in pixels.
        """
        head, config, grid = self.head, self.head.config, self.grid(size)
        head.to(x0.device)
        total: Tensor | None = None

        def add(place: int, layer: str, maps: Tensor) -> None:
            nonlocal total
            total = head.accumulate(total, place, layer, maps, grid)

        steps, clean = config["steps"], config["clean_timestep"]
        walk_maps(self.denoiser, x0, condition, config["layers"], steps, head.reads, add, clean)
        assert total is not None
        return total

    def grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """(H, W) of the descriptors of images of `size` in pixels: that of the finest layer."""
        if size not in self._sizes:
            table = {layer.path: layer.grid for layer in list_layers(self.denoiser, size, detail="all")}
            grids = [table[path] for path in self.head.config["layers"]]
            self._sizes[size] = (max(h for h, _ in grids), max(w for _, w in grids))
        return self._sizes[size]

    def __repr__(self) -> str:
        config = self.head.config
        return (
            f"Hyperfeatures({type(self.denoiser.model).__name__}, {len(config['layers'])} layers x "
            f"{len(self.head.reads)} levels of {config['steps']} steps, width={config['width']}, "
            f"image_size={self.image_size!r})"
        )


def _opened(head: HyperfeaturesHead, folder: Path, base: Any, **place: str | None) -> Denoiser:
    if isinstance(base, Denoiser):
        return base
    if base is not None and not isinstance(base, (str, os.PathLike)):
        return Denoiser.from_pipe(base)
    if base is not None:
        return Denoiser.from_pretrained(os.fspath(base), **place)
    name = head.config["base_model"]
    if name is None:
        raise ValueError(
            f"The head in {str(folder)!r} was made on a {head.config['base_class']} without a name. Pass the model: "
            "base=<folder, Hub id, pipeline or Denoiser>."
        )
    beside = folder.parent / name
    known = beside if not Path(name).is_dir() and (beside / "model_index.json").is_file() else name
    try:
        return Denoiser.from_pretrained(known, **place)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"The head's base {name!r} cannot be opened ({error}) Pass base=<folder, Hub id, pipeline or Denoiser> "
            f"with the same {head.config['base_class']}."
        ) from error


__all__ = ["Hyperfeatures"]
