"""`FeatureInterpreter`: maps of several levels to a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_channels, check_sizes
from diffusers_repr.models.mixin import ReprModelMixin


class FeatureInterpreter(ReprModelMixin, ModelMixin, ConfigMixin):
    """DreamTeacher's interpreter (arXiv 2307.07487, section 3.3) of a generator's features.

    From the coarsest level to the finest: a 1x1 convolution, enlarged and put beside the next level's, a
    depthwise-separable convolution, group norm and SiLU.

    Args:
        layers: Names of the levels, finest first.
        channels: Of each.
        num_classes: Logits of a pixel.
        width: Channels inside.
        dropout: Before the logits.
        groups: Of the group norms.
        timestep: At which the features were read that it was trained on; None: not told.
        noise: As `timestep`: `match_t` or `none`, as of the teacher.
        target_norm: As `timestep`: how they were normed, `image` or `channels`.

    Raises:
        ValueError: For levels and channels that do not pair up, or a size below 1.

    Example:
        >>> interpreter = FeatureInterpreter(["fine", "coarse"], [4, 8], num_classes=3, width=8, groups=4)
        >>> interpreter([torch.randn(2, 4, 8, 6), torch.randn(2, 8, 4, 3)]).shape
        torch.Size([2, 3, 8, 6])
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        num_classes: int,
        width: int = 256,
        dropout: float = 0.1,
        groups: int = 32,
        timestep: float | None = None,
        noise: str = "match_t",
        target_norm: str = "image",
    ) -> None:
        super().__init__()
        check_channels(layers, channels)
        check_sizes(num_classes=num_classes, width=width, groups=groups)
        if width % groups or not 0 <= dropout < 1:
            raise ValueError(f"`groups` divides `width`, `dropout` is a share; got {groups}, {width} and {dropout}.")
        self.enter = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.Conv2d(2 * width, width, 1),
                nn.GroupNorm(groups, width), nn.SiLU(),
            )
            for _ in channels[1:]
        )  # fmt: skip
        self.drop = nn.Dropout(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `(B, C_l, h_l, w_l)`, finest first, to logits `(B, num_classes, h_0, w_0)`."""
        x = self.enter[-1](maps[-1])
        pairs = list(zip(maps, self.enter, strict=True))[:-1]
        for (value, enter), mix in zip(reversed(pairs), reversed(self.mix), strict=True):
            finer = enter(value)
            x = F.interpolate(x, tuple(finer.shape[2:]), mode="bilinear", align_corners=False)
            x = mix(torch.cat([finer, x], 1))
        return self.classify(self.drop(x))


__all__ = ["FeatureInterpreter"]
