"""`FeatureAdapters`: point-wise networks from a layer's features to those at a timestep; the identity at first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_channels, check_sizes
from diffusers_repr.models.layers import CastLinear, wide_dtype
from diffusers_repr.models.mixin import ReprModelMixin

_EPS = 1e-6  # of the root mean square


class GatedBlock(nn.Module):
    """`x + W_down SwiGLU(W_up RMS(x))`, each position by itself; `W_down` is 0 at first.

    Args:
        width: Channels.
        hidden: Of the gated layer.
        modulated_by: Values that scale the normalised channels by `1 + W m`, `W` 0 at first; 0: a learned scale.
    """

    def __init__(self, width: int, hidden: int, modulated_by: int = 0) -> None:
        super().__init__()
        self.scale = None if modulated_by else nn.Parameter(torch.ones(width))
        self.modulate = CastLinear(modulated_by, width, bias=False) if modulated_by else None
        self.up = CastLinear(width, 2 * hidden, bias=False)
        self.down = CastLinear(hidden, width, bias=False)
        nn.init.zeros_(self.down.weight)
        if self.modulate is not None:
            nn.init.zeros_(self.modulate.weight)

    def forward(self, x: Tensor, m: Tensor | None = None) -> Tensor:
        """`(..., width)` to the same, broadcast with what `m` `(..., modulated_by)` gives."""
        scale: Any = 1 + self.modulate(m) if self.modulate is not None else cast(Tensor, self.scale).to(x.dtype)
        value, gate = self.up(rms(x) * scale).chunk(2, dim=-1)
        return x + self.down(value * functional.silu(gate))


class FeatureAdapters(ReprModelMixin, ModelMixin, ConfigMixin):
    """The adapters of CleanDIFT (arXiv 2412.03439): features of a clean image as those of a noisy one at a timestep.

    An adapter a layer: `depth` gated blocks on every position, modulated by one vector m(t) for all layers: random
    Fourier features of the timestep, a linear map, and a mapping network of gated blocks.

    Args:
        layers: Names of the features.
        channels: Channels of each.
        depth: Blocks of an adapter.
        expansion: Width of their gated layer, times the channels.
        time_width: Values of m.
        time_hidden: Of the mapping network's gated layers.
        time_depth: Blocks of the mapping network.
        timestep_range: Smallest and largest timestep; they are brought to [0, 1].

    Raises:
        ValueError: For layers and channels that do not pair up, or a size below 1.

    Example:
        >>> adapters = FeatureAdapters(["a"], [8], time_width=4, time_hidden=6)
        >>> x = torch.randn(2, 5, 8)
        >>> out = adapters({"a": x}, torch.tensor([[1.0, 500.0, 900.0], [2.0, 3.0, 4.0]]))["a"]
        >>> out.shape, torch.equal(out[:, 1], x)
        (torch.Size([2, 3, 5, 8]), True)
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        depth: int = 3,
        expansion: float = 1.0,
        time_width: int = 256,
        time_hidden: int = 768,
        time_depth: int = 2,
        timestep_range: Sequence[float] = (0.0, 999.0),
    ) -> None:
        super().__init__()
        check_channels(layers, channels)
        hidden = [int(expansion * width) for width in channels]
        widths = {f"expansion * channels[{at}]": width for at, width in enumerate(hidden)}
        check_sizes(depth=depth, time_hidden=time_hidden, time_depth=time_depth, **widths)
        if time_width < 2 or time_width % 2 or not timestep_range[0] < timestep_range[1]:
            raise ValueError(f"time_width is even, timestep_range rises; got {time_width} and {timestep_range}.")
        self.register_buffer("frequencies", torch.randn(time_width // 2))
        self.time_in = CastLinear(time_width, time_width, bias=False)
        self.time_scales = nn.ParameterList(torch.ones(time_width) for _ in range(2))
        self.mapping = nn.ModuleList(GatedBlock(time_width, time_hidden) for _ in range(time_depth))
        self.adapters = nn.ModuleList(
            nn.ModuleList(GatedBlock(width, wide, time_width) for _ in range(depth))
            for width, wide in zip(channels, hidden, strict=True)
        )

    def modulation(self, timestep: Tensor) -> Tensor:
        """M of timesteps `(...)`: `(..., time_width)`, float32 or wider."""
        low, high = self.config["timestep_range"]
        dtype = wide_dtype(self)
        place = (timestep.to(dtype) - low) / (high - low)
        angle = 2 * math.pi * place[..., None] * self.frequencies.to(dtype)
        x = self.time_in(torch.cat([angle.cos(), angle.sin()], dim=-1))
        first, last = (scale.to(dtype) for scale in self.time_scales)
        x = rms(x) * first
        for block in self.mapping:
            x = block(x)
        return rms(x) * last

    def adapt(self, layer: str, tokens: Tensor, m: Tensor) -> Tensor:
        """One layer's features at the timesteps of `m`.

        Args:
            layer: Its name.
            tokens: `(B, N, C)`.
            m: From `modulation`, `(B, width)`, or `(B, K, width)` of K timesteps a sample.

        Returns:
            `(B, N, C)` or `(B, K, N, C)`, float32 or wider.

        Raises:
            ValueError: For a layer that has no adapter.
        """
        layers = list(self.config["layers"])
        if layer not in layers:
            raise ValueError(f"No adapter for layer {layer!r}; there are {layers}.")
        x = tokens.to(m.dtype) if m.ndim == 2 else tokens.to(m.dtype)[:, None]
        for block in cast(nn.ModuleList, self.adapters[layers.index(layer)]):
            x = block(x, m[..., None, :])
        return x if m.ndim == 2 else x.expand(-1, m.shape[1], -1, -1)

    def forward(self, features: Mapping[str, Tensor], timestep: Tensor) -> dict[str, Tensor]:
        """Features of clean images as those at timesteps.

        Args:
            features: Layer -> tokens `(B, N, C)`.
            timestep: `(B,)`, or `(B, K)` for K timesteps of each sample.

        Returns:
            Layer -> `(B, N, C)`, or `(B, K, N, C)`.
        """
        m = self.modulation(timestep)
        return {layer: self.adapt(layer, tokens, m) for layer, tokens in features.items()}


def rms(x: Tensor) -> Tensor:
    """Channels over their root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)


__all__ = ["FeatureAdapters", "GatedBlock", "rms"]
