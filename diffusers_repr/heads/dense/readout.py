"""`ReadoutHead`: reads edges, depth, pose, appearance or correspondence from a frozen denoiser's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.dense.base import MapHead
from diffusers_repr.heads.dense.parts import (
    NetworkTimeEmbedding,
    TimeEmbedding,
    group_norm,
    network_time_layers,
    resized_projections,
)
from diffusers_repr.models.layers import CastConv2d, CastLinear, Projection

ReadoutKind = Literal["spatial", "appearance", "correspondence"]
READOUT_KINDS: tuple[ReadoutKind, ...] = ("spatial", "appearance", "correspondence")
TIME_SOURCES = ("own", "network", "none")


class Bottleneck(nn.Module):
    """The residual block of one map, after its 1x1 convolutions have been applied and resized.

    Args:
        bottleneck: Channels of the branch.
        width: Channels of the result.
        time_width: Values of the time embedding; 0 for none.
    """

    def __init__(self, bottleneck: int, width: int, time_width: int) -> None:
        super().__init__()
        self.widths = (bottleneck, width)
        self.norm_in, self.norm_mid = group_norm(bottleneck), group_norm(bottleneck)
        self.norm_out, self.norm_shortcut = group_norm(width), group_norm(width)
        self.time = CastLinear(time_width, bottleneck) if time_width else None
        self.conv_mid = CastConv2d(bottleneck, bottleneck, 3, padding=1, bias=False)
        self.conv_out = CastConv2d(bottleneck, width, 1, bias=False)

    def forward(self, projected: Tensor, time: Tensor | None) -> Tensor:
        """`(B, bottleneck + width, H, W)`, the inputs of branch and shortcut, to `(B, width, H, W)`."""
        x, shortcut = projected.split(self.widths, dim=1)
        x = functional.relu(self.norm_in(x))
        if self.time is not None and time is not None:
            x = x + functional.relu(self.time(time))[:, :, None, None]
        x = functional.relu(self.norm_mid(self.conv_mid(x)))
        x = self.norm_out(self.conv_out(x))
        return functional.relu(x + self.norm_shortcut(shortcut))


@register_head("readout")
class ReadoutHead(MapHead, ModelMixin, ConfigMixin):
    """Luo et al. 2024, Readout Guidance: a residual block a map, their learned average F, a small output head.

    `F = sum_l softmax(w)_l b_l(map_l, t)`. `kind="spatial"` gives `tanh(convolutions(F))`, `(B, out_channels, H, W)`;
    `"appearance"` and `"correspondence"` give F itself, `(B, width, H, W)`, the latter without the time embedding.
    The 1x1 convolutions act at each map's own resolution, before the bilinear resize, which changes nothing and costs
    a fraction; group norms come after it. The time embedding is the head's own and learned with it, or a copy of the
    network's, as in the paper; either way the head needs features only.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        kind: `spatial`, `appearance` or `correspondence`.
        out_channels: Of a spatial head; 3 in the paper.
        label_range: Smallest and largest label of a spatial head.
        width: Channels of F.
        bottleneck: Channels inside a residual block.
        output_widths: Channels of the output head's two hidden convolutions.
        time_width: Values of the time embedding.
        time_source: `own`, learned with the head; `network`, a frozen copy of that of a U-Net as Stable Diffusion's,
            which `for_base` takes; `none`. A correspondence head has none in any case.
        reversed_time: Embed `T - t` of T timesteps in place of t, as the published heads were trained.
        target: What is read, in a word, such as `edges`.
        level_range: Smallest and largest training timestep the head has seen.
        timestep_range: Those of the noise process.
        base_model: Name of the base; this and the following are recorded by `for_base`.
        base_class: Its class.
        base_config: Its config without defaults.
        base_fingerprint: Hash of class and config.
        noise_kind: Kind of its noise process.
        noise_fingerprint: Hash of its noise process.

    Raises:
        ValueError: For an unknown kind, or layers, channels, widths or ranges that do not fit.

    Example:
        >>> head = ReadoutHead(["a", "b"], [8, 4], width=8, bottleneck=4, output_widths=(4, 4), time_width=8)
        >>> head({"a": torch.zeros(2, 8, 3, 3), "b": torch.zeros(2, 4, 6, 6)}, 261).shape
        torch.Size([2, 1, 6, 6])
    """

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        kind: str = "spatial",
        out_channels: int = 1,
        label_range: Sequence[float] = (-1.0, 1.0),
        width: int = 384,
        bottleneck: int = 96,
        output_widths: Sequence[int] = (128, 32),
        time_width: int = 1280,
        time_source: str = "own",
        reversed_time: bool = False,
        target: str | None = None,
        level_range: Sequence[float] = (0.0, 999.0),
        timestep_range: Sequence[float] = (0.0, 999.0),
        base_model: str | None = None,
        base_class: str | None = None,
        base_config: Mapping[str, Any] | None = None,
        base_fingerprint: str | None = None,
        noise_kind: str | None = None,
        noise_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if kind not in READOUT_KINDS:
            raise ValueError(f"Unknown kind {kind!r}; expected one of {', '.join(READOUT_KINDS)}.")
        if len(output_widths) != 2:
            raise ValueError(f"output_widths must be two whole numbers; got {output_widths!r}.")
        sizes = {"width": width, "bottleneck": bottleneck, "out_channels": out_channels, "time_width": time_width}
        self.check_arguments({**sizes, **{f"output_widths[{i}]": v for i, v in enumerate(output_widths)}})
        if time_source not in TIME_SOURCES:
            raise ValueError(f"Unknown time_source {time_source!r}; expected one of {', '.join(TIME_SOURCES)}.")
        if kind == "correspondence" and (time_source == "network" or reversed_time):
            raise ValueError("A correspondence head takes no time; leave time_source and reversed_time out.")
        if time_source == "none" and reversed_time:
            raise ValueError('reversed_time would not act: the head takes no time (time_source="none"); leave it out.')
        timed = kind != "correspondence" and time_source != "none"
        self.time_embedding: TimeEmbedding | NetworkTimeEmbedding | None = None
        if timed:
            own = time_source == "own"
            self.time_embedding = (
                TimeEmbedding(time_width, timestep_range) if own else NetworkTimeEmbedding(time_width)
            )
        both = bottleneck + width
        self.project = nn.ModuleList(Projection(c, both, bias=False) for c in channels)
        self.blocks = nn.ModuleList(Bottleneck(bottleneck, width, time_width if timed else 0) for _ in channels)
        self.weights = nn.Parameter(torch.zeros(len(layers)))
        sizes_out = [width, *output_widths]
        self.hidden = nn.ModuleList()
        if kind == "spatial":
            pairs = zip(sizes_out, sizes_out[1:], strict=False)
            self.hidden.extend(CastConv2d(a, b, 3, padding=1) for a, b in pairs)
            self.output = CastConv2d(sizes_out[-1], out_channels, 1)

    @classmethod
    def for_base(
        cls,
        denoiser: Denoiser,
        layers: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> Any:
        """As `MapHead.for_base`; with `time_source="network"` the time embedding is copied from the base.

        Args:
            denoiser: The base.
            layers: As there.
            image_size: As there.
            **options: As there.

        Raises:
            ValueError: As there, and for a base whose time embedding is of another form.
        """
        if options.get("time_source") != "network":
            return super().for_base(denoiser, layers, image_size, **options)
        _, last = network_time_layers(denoiser.model)
        options.setdefault("time_width", last.out_features)
        head = super().for_base(denoiser, layers, image_size, **options)
        head.time_embedding.take(denoiser.model)
        return head

    def aggregate(self, maps: Mapping[str, Tensor], timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """F, `(B, width, H, W)`."""
        first = next(iter(maps.values()))
        told = self.mirrored(timestep) if self.config["reversed_time"] else timestep
        time = None if self.time_embedding is None else self.time_embedding(told, first.dtype)
        shares = self.weights.to(first.dtype).softmax(0)
        projected = resized_projections(self.project, list(maps.values()), size)
        total: Tensor | None = None
        for share, block, x in zip(shares, self.blocks, projected, strict=True):
            part = share * block(x, time)
            total = part if total is None else total + part
            del x, part  # before the next map is made
        assert total is not None
        return total

    def mirrored(self, timestep: Any) -> Any:
        """`T - t`, of the T timesteps of the noise process from 0."""
        low, high = self.config["timestep_range"]
        return low + high + 1 - timestep

    def readout(self, maps: Mapping[str, Tensor], timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Checked maps of one dtype, timesteps `(B,)` and the common size to `(B, out, H, W)`."""
        x = self.aggregate(maps, timestep, size)
        if self.config["kind"] != "spatial":
            return x
        for layer in self.hidden:
            x = functional.silu(layer(x))
        return self.output(x).tanh()


__all__ = ["READOUT_KINDS", "TIME_SOURCES", "Bottleneck", "ReadoutHead"]
