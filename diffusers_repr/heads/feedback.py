"""`FeedbackHead`, DifFeed: what the decoder made of an image is fed back into the encoder, and read then."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser, Layer, list_layers
from diffusers_repr.heads.attention import AttentionHead
from diffusers_repr.heads.base import register_head
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastBatchNorm2d, CastConv2d, Projection, wide_dtype
from diffusers_repr.models.outputs import ClassifierOutput

SecondPass = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)")


def feedback_pairs(
    denoiser: Denoiser, image_size: int | tuple[int, ...] | None = None
) -> tuple[tuple[Layer, Layer], ...]:
    """Which layer of a U-Net's decoder feeds which of its encoder in DifFeed, from the table of its layers.

    The code of arXiv 2311.17921 pairs layer `b` of ADM's 37 with layer `38 - b`, one pair a stage: the decoder's last
    block but one, before the widening, with the first block of the encoder's stage that it mirrors. A block is its
    attention where it has one.

    Args:
        denoiser: Of a `UNet2DModel` or a `UNet2DConditionModel`.
        image_size: As in `list_layers`.

    Returns:
        (feeding layer, fed layer), in the order in which the decoder runs.

    Raises:
        TypeError: For a network without the two halves.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> [(a.path, b.path) for a, b in feedback_pairs(Denoiser(unet, DDPMScheduler()))]
        [('up_blocks.0.resnets.0', 'down_blocks.1.resnets.0'), ('up_blocks.1.resnets.0', 'down_blocks.0.resnets.0')]
    """
    stages: dict[str, dict[int, dict[int, Layer]]] = {"down": {}, "up": {}}
    for layer in list_layers(denoiser, image_size):
        found = _BLOCK.fullmatch(layer.path)
        if found:  # of a residual block and its attention, the later one
            stages[found[1]].setdefault(int(found[2]), {})[int(found[4])] = layer
    up, down = stages["up"], stages["down"]
    if not up or len(up) != len(down) or any(len(blocks) < 2 for blocks in up.values()):
        raise TypeError(
            f"{type(denoiser.model).__name__} has no decoder stages that mirror stages of an encoder; feedback is for "
            "a UNet2DModel or a UNet2DConditionModel."
        )
    return tuple((up[at][len(up[at]) - 2], down[len(down) - 1 - at][0]) for at in sorted(up))


class _Feed(nn.Module):
    """What is fed back of one layer: 1x1 convolution, batch norm, ReLU, and by option a 3x3 convolution a channel."""

    def __init__(self, channels: int, out_channels: int, depthwise: bool) -> None:
        super().__init__()
        self.projection = Projection(channels, out_channels, bias=False)
        self.norm = CastBatchNorm2d(out_channels)
        self.conv = (
            CastConv2d(out_channels, out_channels, 3, padding=1, groups=out_channels, bias=False)
            if depthwise
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.projection(x)))
        return x if self.conv is None else self.conv(x)


@register_head("feedback")
class FeedbackHead(AttentionHead, ModelMixin, ConfigMixin):
    """DifFeed (Mukhopadhyay et al. 2023, arXiv 2311.17921): learned feedback, and an `AttentionHead` behind it.

    A first forward gives the maps of the `sources`. Of each, `feedback` makes what is added to the output of its
    target in a second forward of the same input; the head's `layers` are read there. `FeedbackPasses` of
    `diffusers_repr.capture` runs the two, and a `Probe` with this head does.

    Args:
        layers: Full module paths of the maps that are read in the second forward.
        channels: Channels of each.
        sizes: (H, W) of each in cells; see `AttentionHead`.
        num_classes: K.
        levels: Noise levels, each with all of the layers.
        sources: Paths of the layers that feed, in the first forward; `feedback_pairs` tells the paper's.
        source_channels: Channels of each.
        targets: Path of the layer that each feeds.
        target_channels: Channels of each.
        depthwise: Whether a 3x3 convolution of each channel comes last (`C_B_R_C` in the paper's code, whose default
            `C_B_R` has none).
        width: As in `AttentionHead`.
        num_layers: As in `AttentionHead`.
        num_attention_heads: As in `AttentionHead`.
        mlp_ratio: As in `AttentionHead`.
        norm: As in `AttentionHead`.

    Raises:
        ValueError: For layers, channels, sizes or widths that do not fit.
    """

    reads_once = False

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        sizes: Sequence[Sequence[int]],
        num_classes: int,
        levels: int = 1,
        sources: Sequence[str] = (),
        source_channels: Sequence[int] = (),
        targets: Sequence[str] = (),
        target_channels: Sequence[int] = (),
        depthwise: bool = False,
        width: int = 1024,
        num_layers: int = 2,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm: str = "layer",
    ) -> None:
        super().__init__(
            layers=layers, channels=channels, sizes=sizes, num_classes=num_classes, levels=levels, width=width,
            num_layers=num_layers, num_attention_heads=num_attention_heads, mlp_ratio=mlp_ratio, norm=norm,
        )  # fmt: skip
        pairs: list[list[Any]] = [list(sources), list(source_channels), list(targets), list(target_channels)]
        if not sources or len({len(part) for part in pairs}) != 1 or len(set(targets)) != len(targets):
            raise ValueError(
                "sources, source_channels, targets and target_channels must go together, each target once; got "
                f"{', '.join(map(str, pairs))}. feedback_pairs(denoiser) tells the paper's."
            )
        for what, at in (("source", 0), ("target", 2)):
            named = zip(pairs[at], pairs[at + 1], strict=True)
            check_sizes(**{f"channels of {what} {path!r}": count for path, count in named})
        self.feeds = nn.ModuleList(
            _Feed(a, b, depthwise) for a, b in zip(source_channels, target_channels, strict=True)
        )

    @staticmethod
    def options_for(denoiser: Denoiser, image_size: int | tuple[int, ...] | None = None) -> dict[str, list[Any]]:
        """`sources`, `targets` and their channels for a U-Net, as `feedback_pairs` pairs them."""
        pairs = feedback_pairs(denoiser, image_size)
        found: dict[str, list[Any]] = {}
        for at, name in enumerate(("source", "target")):
            found |= {f"{name}s": [pair[at].path for pair in pairs]}
            found |= {f"{name}_channels": [pair[at].channels for pair in pairs]}
        return found

    def check_values(self) -> None:
        """Refuse running variances below 0."""
        for module in self.modules():
            variance = getattr(module, "running_var", None)
            if isinstance(variance, Tensor) and not variance.is_meta and float(variance.min()) < 0:
                raise ValueError(f"The running variance of this {type(self).__name__} has values below 0.")

    def feedback(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is fed back: target -> map `(rows, target_channels, h, w)` at its source's size, float32 or wider.

        In training the batch norms take the statistics of each level on its own, rows level by level.

        Args:
            features: Source -> map `(rows, C, h, w)` of the first forward.

        Raises:
            ValueError: If one is missing or of another shape.
        """
        found: dict[str, Tensor] = {}
        names = ("sources", "source_channels", "targets")
        for source, channels, target, feed in zip(*(self.config[n] for n in names), self.feeds, strict=True):
            x = features.get(source)
            if x is None or x.ndim != 4 or x.shape[1] != channels:
                came = f"among {list(features)} it is not" if x is None else f"got {tuple(x.shape)}"
                raise ValueError(f"{type(self).__name__} is fed by {source!r} as (B, {channels}, h, w); {came}.")
            with torch.autocast(x.device.type, enabled=False):
                parts = x.to(wide_dtype(self)).chunk(int(self.config["levels"]) if self.training else 1)
                found[target] = torch.cat([feed(part) for part in parts])
        return found

    def forward(
        self,
        features: Mapping[str, Tensor],
        return_dict: bool | None = None,
        second_pass: SecondPass | None = None,
    ) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits `(B, num_classes)`.

        Args:
            features: Maps by layer: of the sources, `(levels * B, C, h, w)`, or without `second_pass` what the head
                reads in the second forward, as for an `AttentionHead`.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.
            second_pass: From what `feedback` gave to the maps of the head's layers.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        maps = features if second_pass is None else second_pass(self.feedback(features))
        return super().forward(maps, return_dict)


__all__ = ["FeedbackHead", "SecondPass", "feedback_pairs"]
