"""What heads on maps share: checked maps, 1x1 convolutions before the resize, a time embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.dense import base as readout_base
from diffusers_repr.heads.dense.features import readout_layers, tap_channels
from diffusers_repr.models.layers import CastGroupNorm, CastLinear, wide_dtype
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput, packed


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned, no antialiasing: weights sum to 1, so 1x1 convolutions commute with it."""
    return x if tuple(x.shape[-2:]) == size else nn.functional.interpolate(x, size, mode="bilinear")


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, or of as many as divide both 32 and the channels."""
    return CastGroupNorm(math.gcd(32, channels), channels)


class TimeEmbedding(nn.Module):
    """Sinusoid of the timestep, then `Linear, SiLU, Linear, SiLU`.

    Timesteps are first mapped from `timestep_range` to [0, 1000], so that every noise process spans the frequencies.

    Args:
        width: Values of the embedding; the sinusoid has a quarter of them.
        timestep_range: Smallest and largest timestep of the base's noise process.
    """

    def __init__(self, width: int, timestep_range: Sequence[float]) -> None:
        super().__init__()
        self.low, self.high = float(timestep_range[0]), float(timestep_range[1])
        self.frequencies = max(width // 8, 1)
        self.layers = nn.ModuleList([CastLinear(2 * self.frequencies, width), CastLinear(width, width)])

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps `(B,)` to embeddings `(B, width)` in `dtype`."""
        place = 1000 * (timestep - self.low) / (self.high - self.low)
        power = torch.arange(self.frequencies, dtype=torch.float64, device=timestep.device) / self.frequencies
        angle = place[:, None] * torch.exp(-math.log(10_000) * power)
        x = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x


class MapHead(ReprModelMixin, ModelMixin, ConfigMixin):
    """Base of heads that take maps of named layers to maps `(B, out, H, W)`.

    A subclass registers `layers`, `channels`, `label_range`, `level_range` and what `describe_base` gives, calls
    `check_arguments`, and writes `readout`.
    """

    _no_split_modules: list[str] = []

    def check_arguments(self, widths: Mapping[str, int]) -> None:
        """Check the registered layers, channels and ranges, and the widths given.

        Raises:
            ValueError: For layers and channels that do not pair up, widths below 1, a range the wrong way round, or a
                record of the base that is none.
        """
        readout_base.RECORD(dict(self.config), type(self).__name__)
        layers, channels = list(self.config["layers"]), list(self.config["channels"])
        if not layers or len(set(layers)) != len(layers) or len(layers) != len(channels):
            raise ValueError(
                f"layers and channels must pair up, each layer once; got {len(layers)} layers ({layers}) and "
                f"{len(channels)} channels ({channels})."
            )
        sizes = {**widths, **{f"channels of {k!r}": c for k, c in zip(layers, channels, strict=True)}}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
        for name in ("label_range", "timestep_range", "level_range"):
            low, high = self.config[name]
            if not low < high:
                raise ValueError(f"{name} must be (low, high) with low < high; got ({low}, {high}).")

    @classmethod
    def for_base(
        cls,
        denoiser: Denoiser,
        layers: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> Any:
        """A new head for a network: its channels are looked up and the base is recorded.

        Args:
            denoiser: The base.
            layers: Full module paths; `readout_layers(denoiser.model)` if None.
            image_size: Pixels at which sizes are looked up, where the network's config tells none.
            **options: Further arguments of the class.

        Raises:
            ValueError: For layers that do not exist or give no map.
        """
        paths = readout_layers(denoiser.model) if layers is None else list(layers)
        options.setdefault("level_range", denoiser.schedule.timestep_range)
        channels = tap_channels(denoiser, paths, image_size)
        return cls(**{**readout_base.describe_base(denoiser), "layers": paths, "channels": channels, **options})

    def check_base(self, denoiser: Denoiser) -> None:
        """Refuse another base than the one the head was trained on.

        Raises:
            TypeError: If `denoiser` is no `Denoiser`.
            ValueError: If class, config, layers, channels or noise process differ; names both sides.
        """
        config = self.config
        readout_base.check_base(denoiser, type(self).__name__, config, config["layers"], config["channels"])

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest label the head was trained on."""
        low, high = self.config["label_range"]
        return float(low), float(high)

    def readout(self, maps: Mapping[str, Tensor], timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Checked maps of one dtype, timesteps `(B,)` float64 and the common size to `(B, out, H, W)`."""
        raise NotImplementedError

    def forward(
        self,
        features: Mapping[str, Tensor],
        timestep: Tensor | float,
        size: tuple[int, int] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """Read a map out of features.

        Args:
            features: Layer path -> map `(B, C_l, h_l, w_l)`, any floating dtype; others than the head's are ignored.
            timestep: Training timestep that the network was told, one or `(B,)`.
            size: (H, W) of the result; the largest height and width among the maps if None.
            return_dict: None for the map itself, True for an output with `sample`, False for a tuple.

        Returns:
            `(B, out, H, W)`, float32 (float64 for a head in float64), differentiable with respect to the features.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        dtype = wide_dtype(self)
        taken = self._take(features)
        first = next(iter(taken.values()))
        if size is None:
            size = (max(x.shape[2] for x in taken.values()), max(x.shape[3] for x in taken.values()))
        times = readout_base.timestep_vector(timestep, first.shape[0], first.device)
        with torch.autocast(first.device.type, enabled=False):
            wide = {path: x.to(dtype) for path, x in taken.items()}
            value = self.readout(wide, times, (int(size[0]), int(size[1])))
        return packed(value, SampleOutput, return_dict)

    def _take(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name, taken = type(self).__name__, {}
        for path, channels in zip(self.config["layers"], self.config["channels"], strict=True):
            if path not in features:
                raise ValueError(f"{name} reads layer {path!r}, which is not among the features {list(features)}.")
            x = features[path]
            if x.ndim != 4 or x.shape[1] != channels:
                raise ValueError(
                    f"{name} takes {path!r} as a map (B, {channels}, h, w); got {tuple(x.shape)}."
                    + (" `to_map` turns tokens into maps." if x.ndim == 3 else "")
                )
            taken[path] = x
        rows = {x.shape[0] for x in taken.values()}
        if len(rows) > 1:
            raise ValueError(f"The features have {sorted(rows)} rows; {name} takes one batch.")
        return taken


def resized_projections(
    layers: Iterable[nn.Module], maps: Sequence[Tensor], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Each map through its 1x1 convolution at its own resolution, then to `size`; one at a time is held.

    Bilinear weights sum to 1 and a 1x1 convolution is affine in the channels, so the two commute: this equals resizing
    first, with the resize on fewer channels and the convolution on fewer pixels.
    """
    for layer, x in zip(layers, maps, strict=True):
        yield resize(layer(x), size)


__all__ = ["MapHead", "TimeEmbedding", "group_norm", "resize", "resized_projections"]
