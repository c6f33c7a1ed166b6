"""`DepthHead`: depth of every pixel from a frozen denoiser's features, by a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.dense.base import MapHead
from diffusers_repr.heads.dense.parts import TimeEmbedding, resized_projections
from diffusers_repr.models.layers import CastConv2d, CastLinear, Projection


@register_head("depth")
class DepthHead(MapHead, ModelMixin, ConfigMixin):
    """Kim et al. 2022, Depth-Aware Guidance: an MLP a pixel over resized, concatenated maps and a time embedding.

    The first layer is linear, so it is applied to each map at its own resolution, resized, and summed; this equals
    concatenating first. A strong head reads several layers, a weak one few: two heads. Widths are not published.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        hidden: Widths of the hidden layers, SiLU after each.
        out_channels: Values a pixel.
        label_range: Smallest and largest label.
        time_width: Values of the time embedding.
        target: What is read, in a word.
        level_range: Smallest and largest training timestep the head has seen; below 800 of 1000 in the paper.
        timestep_range: Those of the noise process.
        base_model: Name of the base; this and the following are recorded by `for_base`.
        base_class: Its class.
        base_config: Its config without defaults.
        base_fingerprint: Hash of class and config.
        noise_kind: Kind of its noise process.
        noise_fingerprint: Hash of its noise process.

    Raises:
        ValueError: For layers, channels, widths or ranges that do not fit.

    Example:
        >>> import torch
        >>> head = DepthHead(["a", "b"], [8, 4], hidden=(8,), time_width=8)
        >>> head({"a": torch.zeros(2, 8, 3, 3), "b": torch.zeros(2, 4, 6, 6)}, torch.tensor([9, 500])).shape
        torch.Size([2, 1, 6, 6])
    """

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        hidden: Sequence[int] = (128, 64),
        out_channels: int = 1,
        label_range: Sequence[float] = (-1.0, 1.0),
        time_width: int = 256,
        target: str | None = "depth",
        level_range: Sequence[float] = (0.0, 799.0),
        timestep_range: Sequence[float] = (0.0, 999.0),
        base_model: str | None = None,
        base_class: str | None = None,
        base_config: Mapping[str, Any] | None = None,
        base_fingerprint: str | None = None,
        noise_kind: str | None = None,
        noise_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden must hold at least one width; got none.")
        widths = {f"hidden[{i}]": v for i, v in enumerate(hidden)}
        self.check_arguments({**widths, "out_channels": out_channels, "time_width": time_width})
        self.time_embedding = TimeEmbedding(time_width, timestep_range)
        self.project = nn.ModuleList(Projection(c, hidden[0], bias=False) for c in channels)
        self.time = CastLinear(time_width, hidden[0])  # also the first layer's bias
        sizes = [*hidden, out_channels]
        self.mlp = nn.ModuleList(CastConv2d(a, b, 1) for a, b in zip(sizes, sizes[1:], strict=False))

    def readout(self, maps: Mapping[str, Tensor], timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Checked maps of one dtype, timesteps `(B,)` and the common size to `(B, out, H, W)`, not bounded."""
        dtype = next(iter(maps.values())).dtype
        x = self.time(self.time_embedding(timestep, dtype))[:, :, None, None]
        for part in resized_projections(self.project, list(maps.values()), size):
            x = x + part
        for layer in self.mlp:
            x = layer(functional.silu(x))
        return x


__all__ = ["DepthHead"]
