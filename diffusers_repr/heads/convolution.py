"""`ConvolutionHead`: a few convolutions over the maps, and their mean over space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.map_classifier import MapClassifier
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastConv2d, CastGroupNorm, CastLinear, Projection


class _Tower(nn.Module):
    """The convolutions over one map, `(B, C, h, w)` to `(B, widths[-1])`."""

    def __init__(self, channels: int, widths: Sequence[int], groups: int) -> None:
        super().__init__()
        self.entry = Projection(channels, widths[0])
        pairs = list(zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(CastGroupNorm(groups, a) for a in widths)
        self.convs = nn.ModuleList(CastConv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norms[0](self.entry(x)))
        for conv, norm in zip(self.convs, list(self.norms)[1:], strict=True):
            x = functional.relu(norm(conv(x)))
        return x.mean((2, 3))


@register_head("convolution")
class ConvolutionHead(MapClassifier, ModelMixin, ConfigMixin):
    """A convolutional classifier of maps, one of the kinds of head that GDC (arXiv 2307.08702) compares.

    A layer's map goes through a 1x1 convolution to `hidden_features[0]` channels and a 3x3 convolution of stride 2 for
    each further width, a group norm and a ReLU after each, and is averaged over space; the convolutions of a layer are
    the same at all levels. A linear layer reads what all layers and levels gave. The paper's code holds no such head:
    these layers are this library's choice.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        sizes: (H, W) of each in cells, as the head reads it; larger maps are averaged over cells.
        num_classes: K.
        levels: Noise levels, each with all of the layers.
        hidden_features: Width of each convolution, first to last.
        norm_num_groups: Of the group norms; every width is a multiple of it.

    Raises:
        ValueError: For layers, channels, sizes or widths that do not fit.

    Example:
        >>> head = ConvolutionHead(["a"], [8], [[4, 4]], num_classes=5, hidden_features=[16, 16], norm_num_groups=4)
        >>> head({"a": torch.rand(3, 8, 4, 4)}).shape
        torch.Size([3, 5])
    """

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        sizes: Sequence[Sequence[int]],
        num_classes: int,
        levels: int = 1,
        hidden_features: Sequence[int] = (256, 256, 256),
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = list(hidden_features)
        self.check_arguments(norm_num_groups=norm_num_groups)
        check_sizes(**{f"hidden_features[{at}]": width for at, width in enumerate(widths)})
        if not widths or any(width % norm_num_groups for width in widths):
            raise ValueError(
                f"hidden_features must be multiples of norm_num_groups={norm_num_groups}, at least one; got {widths}."
            )
        self.towers = nn.ModuleList(_Tower(count, widths, norm_num_groups) for count in channels)
        self.linear = CastLinear(widths[-1] * len(layers) * levels, num_classes)

    def classify(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Logits `(B, num_classes)` of what `take` gave."""
        parts = []
        for path, tower in zip(self.config["layers"], self.towers, strict=True):
            parts.append(tower(maps[path].flatten(0, 1)).unflatten(0, maps[path].shape[:2]))
        return self.linear(torch.cat([level for part in parts for level in part], dim=1))


__all__ = ["ConvolutionHead"]
