"""`HyperfeaturesHead`: maps of many layers at many levels to one map of descriptors, by a learned weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.dense.base import RecordedHead
from diffusers_repr.heads.dense.parts import resize
from diffusers_repr.heads.dense.readout import Bottleneck
from diffusers_repr.heads.hyperfeature_maps import paper_reads, walk_levels
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.models.layers import Projection, wide_dtype
from diffusers_repr.models.outputs import SampleOutput, packed
from diffusers_repr.pictures.mixing import mixing_figure

HYPERFEATURES = "hyperfeatures"  # what a source calls its one layer


@register_head("hyperfeatures")
class HyperfeaturesHead(RecordedHead, ModelMixin, ConfigMixin):
    """Luo et al. 2023, Diffusion Hyperfeatures (arXiv 2305.14334), sec. 3.2.

    `H = sum_{s,l} softmax(w)_{s,l} B_l(F_{s,l})`: layer l at step s of a DDIM inversion, through a bottleneck that is
    the layer's own and the same at all steps. `B_l`: 1x1, 3x3, 1x1 convolutions, a group norm of 32 groups and ReLU
    after each, the last ReLU after a projected shortcut is added: H is not negative. The first 1x1 convolution and
    that of the shortcut act at the map's own resolution and are resized then, which is the same, and costs less;
    maps are added up as they come (`accumulate`), so that the stack of all is never held.

    Args:
        layers: Full module paths of the maps.
        channels: Channels of each.
        steps: Network calls of the inversion up to the noisiest level; 1: the clean image alone.
        reads: The steps at which maps are read, rising; 0 is the clean image. None: those of the paper, in proportion.
        clean_timestep: What the network is told of the clean image; None: -1 where steps are timesteps of DDPM.
        width: Channels of H.
        bottleneck: Channels inside a bottleneck.
        prompt: Of text models, where a call gives none.
        image_size: (H, W) that images are brought to; None: the base's own.
        timesteps: What the network was told at each of `reads`; this and the following are recorded by `for_base`.
        timestep_range: Smallest and largest of the noise process.
        base_model: Name of the base.
        base_class: Its class.
        base_config: Its config without defaults.
        base_fingerprint: Hash of class and config.
        noise_kind: Kind of its noise process.
        noise_fingerprint: Hash of its noise process.

    Raises:
        ValueError: For layers, channels, widths or steps that do not fit.

    Example:
        >>> head = HyperfeaturesHead(["a", "b"], [8, 4], steps=10, reads=[0, 4, 9], width=8, bottleneck=4)
        >>> maps = {"a": torch.zeros(3, 2, 8, 3, 3), "b": torch.zeros(3, 2, 4, 6, 6)}
        >>> head(maps).shape, head.shares().shape
        (torch.Size([2, 8, 6, 6]), torch.Size([3, 2]))
    """

    kind: ClassVar[str | None] = HYPERFEATURES

    @register_to_config
    def __init__(
        self,
        layers: Sequence[str],
        channels: Sequence[int],
        steps: int = 50,
        reads: Sequence[int] | None = None,
        clean_timestep: float | None = None,
        width: int = 384,
        bottleneck: int = 96,
        prompt: str | None = None,
        image_size: Sequence[int] | None = None,
        timesteps: Sequence[float] | None = None,
        timestep_range: Sequence[float] = (0.0, 999.0),
        base_model: str | None = None,
        base_class: str | None = None,
        base_config: Mapping[str, Any] | None = None,
        base_fingerprint: str | None = None,
        noise_kind: str | None = None,
        noise_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.check_inputs({"width": width, "bottleneck": bottleneck})
        self.reads = check_reads(steps, reads)
        project = [Projection(c, bottleneck + width, bias=False) for c in channels]
        blocks = [Bottleneck(bottleneck, width, 0) for _ in channels]
        for layer, block in zip(project, blocks, strict=True):
            _start(*layer.weight.detach().split([bottleneck, width]), block.conv_mid.weight, block.conv_out.weight)
        self.project, self.blocks = nn.ModuleList(project), nn.ModuleList(blocks)
        self.weights = nn.Parameter(torch.ones(len(self.reads), len(layers)))

    @classmethod
    def for_base(
        cls,
        denoiser: Denoiser,
        layers: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> HyperfeaturesHead:
        """A new head for a network: channels and timesteps are looked up and the base is recorded.

        Args:
            denoiser: The base.
            layers: Full module paths; None: the residual branches of all resnets on the way up (`conv2`), of a
                transformer the layers that readout heads take.
            image_size: As in the class; also where channels are looked up.
            **options: Further arguments of the class.

        Raises:
            ValueError: For layers that do not exist or give no map, and steps that the process does not have.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        reads = check_reads(options.get("steps", 50), options.get("reads"))
        levels = walk_levels(denoiser.schedule, options.get("steps", 50), reads, options.get("clean_timestep"))
        return cls(
            **{
                **cls.inputs_of(denoiser, layers, size),
                "image_size": None if size is None else list(size),
                "timesteps": [float(levels[step].timestep) for step in reads],
                **options,
                "reads": reads,
            }
        )

    def shares(self) -> Tensor:
        """The mixing weights after the softmax, `(levels, layers)`; they sum to 1."""
        return self.weights.to(wide_dtype(self)).flatten().softmax(0).view_as(self.weights)

    def plot_weights(self) -> Any:
        """A figure of matplotlib: the shares by layer and level; `figure.savefig("weights.png")` keeps it.

        Raises:
            ImportError: If matplotlib is missing.
        """
        told = self.config["timesteps"]
        names = [f"step {read}" for read in self.reads] if told is None else [f"{time:g}" for time in told]
        return mixing_figure(self.shares(), list(self.config["layers"]), names, "Share in the hyperfeatures")

    def accumulate(self, total: Tensor | None, place: int, layer: str, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Add one layer's part at one level to the sum.

        Args:
            total: The sum so far, `(B, width, H, W)`; None to begin.
            place: Which of `reads`, from 0.
            layer: Its path.
            maps: `(B, C_l, h_l, w_l)`, any floating dtype.
            size: (H, W) of H.

        Returns:
            The sum, float32 or wider; a new tensor where gradients are recorded.

        Raises:
            ValueError: For a layer that is none of the head's, and maps of another shape.
        """
        layers, channels = list(self.config["layers"]), list(self.config["channels"])
        if layer not in layers:
            raise ValueError(f"{type(self).__name__} reads no layer {layer!r}; it reads {layers}.")
        at = layers.index(layer)
        if maps.ndim != 4 or maps.shape[1] != channels[at]:
            raise ValueError(f"{layer!r} is read as maps (B, {channels[at]}, h, w); got {tuple(maps.shape)}.")
        with torch.autocast(maps.device.type, enabled=False):
            projected = resize(self.project[at](maps.to(wide_dtype(self))), size)
            part = self.blocks[at](projected, None)
            share = self.shares()[place, at]
            if total is None:
                return share * part
            return total.add_(share * part) if not torch.is_grad_enabled() else total + share * part

    def forward(
        self,
        features: Mapping[str, Tensor | Sequence[Tensor]],
        size: tuple[int, int] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """H of maps that are all there.

        Args:
            features: Layer path -> maps `(levels, B, C_l, h_l, w_l)` at `reads`, as an extraction with a list of
                timesteps has them, or a list of `(B, C_l, h_l, w_l)`.
            size: (H, W) of the result; the largest height and width among the maps if None.
            return_dict: None for the map itself, True for an output with `sample`, False for a tuple.

        Returns:
            `(B, width, H, W)`, float32 (float64 for a head in float64), not negative.

        Raises:
            ValueError: If a layer or a level is missing, or a map has another shape than the head was made for.
        """
        for layer in self.config["layers"]:
            if layer not in features or len(features[layer]) != len(self.reads):
                count = f"{len(features[layer])} levels" if layer in features else "nothing"
                raise ValueError(
                    f"{type(self).__name__} reads {layer!r} at {len(self.reads)} levels; got {count} among "
                    f"{list(features)}."
                )
        if size is None:
            sizes = [maps[0].shape[-2:] for maps in (features[layer] for layer in self.config["layers"])]
            size = (max(h for h, _ in sizes), max(w for _, w in sizes))
        total: Tensor | None = None
        for place in range(len(self.reads)):
            for layer in self.config["layers"]:
                total = self.accumulate(total, place, layer, features[layer][place], size)
        assert total is not None
        return packed(total, SampleOutput, return_dict)


def check_reads(steps: int, reads: Sequence[int] | None = None) -> list[int]:
    """The steps at which maps are read, checked; those of the paper, in proportion, if None.

    Raises:
        ValueError: Unless they rise, from 0 (the clean image) to below `steps`.
    """
    check_whole("steps", steps)
    found = paper_reads(steps) if reads is None else [check_whole("reads", read, 0, steps - 1) for read in reads]
    if not found or sorted(set(found)) != found:
        raise ValueError(
            f"reads rise from 0, the clean image, to {steps - 1}, the last of {steps} steps; got {reads}."
        )
    return found


def _start(*kernels: Tensor) -> None:
    """He et al. 2015 by outgoing connections, as the reference starts its convolutions."""
    with torch.no_grad():
        for kernel in kernels:
            kernel.normal_(0, math.sqrt(2 / (kernel.shape[0] * kernel[0, 0].numel())))


__all__ = ["HYPERFEATURES", "HyperfeaturesHead", "check_reads"]
