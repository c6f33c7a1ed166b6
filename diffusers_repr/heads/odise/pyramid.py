"""`FeaturePyramid`: maps of many layers and strides to one map a stride."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.heads.dense.parts import group_norm
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastConv2d


class FeaturePyramid(nn.Module):
    """ODISE's: each map through a residual bottleneck of its own, the sum where strides are equal.

    A map is first resized (nearest, as the reference) to the cells that the image has at its stride, which is clipped
    to `strides`: of Stable Diffusion, the U-Net's deepest map of 64 pixels a cell becomes one of 32.

    Args:
        channels: Of each map.
        cell_sizes: Stride of each map.
        width: Channels of the results.
        bottleneck: Channels inside; None: a quarter of `width`.
        strides: Finest and coarsest stride of the results.

    Attributes:
        strides: Of the results, rising.

    Raises:
        ValueError: If a stride between the finest and the coarsest result has no map, or there are fewer than three.

    Example:
        >>> import torch
        >>> pyramid = FeaturePyramid([8, 4, 4, 6], [64, 8, 16, 16], width=8, strides=(8, 32))
        >>> maps = [torch.zeros(1, 8, 1, 1), torch.zeros(1, 4, 8, 8), *[torch.zeros(1, c, 4, 4) for c in (4, 6)]]
        >>> [tuple(level.shape) for level in pyramid(maps, (64, 64))]
        [(1, 8, 8, 8), (1, 8, 4, 4), (1, 8, 2, 2)]
    """

    def __init__(
        self,
        channels: Sequence[int],
        cell_sizes: Sequence[int],
        width: int = 512,
        bottleneck: int | None = None,
        strides: tuple[int, int] = (4, 32),
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(cell_sizes):
            raise ValueError(f"One stride a map is needed; got {len(channels)} maps, {len(cell_sizes)} strides.")
        check_sizes(width=width, **{f"channels[{i}]": c for i, c in enumerate(channels)})
        self.clipped = [min(max(size, strides[0]), strides[1]) for size in cell_sizes]
        self.strides = sorted(set(self.clipped))
        if len(self.strides) < 3 or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"Maps of strides {list(cell_sizes)}, clipped to {tuple(strides)}, give levels of {self.strides}; "
                "three or more are needed, each twice as coarse as the one before. Take other bounds, or more layers."
            )
        inner = bottleneck or max(width // 4, 1)
        self.blocks = nn.ModuleList(_Block(c, inner, width) for c in channels)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Maps `(B, C_i, h_i, w_i)` of images (H, W) to `(B, width, H / stride, W / stride)`, finest first."""
        found: dict[int, Tensor] = {}
        for stride, block, value in zip(self.clipped, self.blocks, maps, strict=True):
            cells = (size[0] // stride, size[1] // stride)
            value = value if tuple(value.shape[2:]) == cells else functional.interpolate(value, cells, mode="nearest")
            made = block(value)
            found[stride] = made if stride not in found else found[stride] + made
        return [found[stride] for stride in self.strides]


class _Block(nn.Module):
    """1x1, 3x3, 1x1 convolutions with group norms, and a shortcut that is projected where channels differ."""

    def __init__(self, channels: int, inner: int, width: int) -> None:
        super().__init__()

        def convolution(enters: int, leaves: int, side: int) -> nn.Sequential:
            layer = CastConv2d(enters, leaves, side, padding=side // 2, bias=False)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            return nn.Sequential(layer, group_norm(leaves))

        self.enter, self.middle = convolution(channels, inner, 1), convolution(inner, inner, 3)
        self.leave = convolution(inner, width, 1)
        self.shortcut = convolution(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.middle(functional.relu(self.enter(x))))
        return functional.relu(self.leave(hidden) + self.shortcut(x))


__all__ = ["FeaturePyramid"]
