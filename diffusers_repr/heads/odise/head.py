"""`OdiseHead`: all that ODISE trains, on a frozen text-to-image model and a frozen CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.features.taps import Tap, find_taps, read_taps
from diffusers_repr.features.windows import cut_windows, stitch_windows, window_places
from diffusers_repr.heads.base import Head, register_head
from diffusers_repr.heads.dense.record import describe_base, refuse_other_base
from diffusers_repr.heads.odise.captioner import ImplicitCaptioner
from diffusers_repr.heads.odise.classification import MaskClassifier
from diffusers_repr.heads.odise.masks import MaskGenerator
from diffusers_repr.heads.odise.pyramid import FeaturePyramid
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.places import public_name

_NO_LAYERS: dict[str, list[Any]] = {"layers": [], "channels": []}  # taps are checked apart, as they are inputs


@dataclass
class OdiseOutput(BaseOutput):
    """What the queries of images are, layer by layer of the mask generator, the last one last.

    Attributes:
        masks: Logits `(B, Q, h, w)` each, at the finest stride.
        logits: Of the classes `(B, Q, K + 1)` each, the background last.
    """

    masks: list[Tensor]
    logits: list[Tensor]


@register_head("odise")
class OdiseHead(Head, ModelMixin, ConfigMixin):
    """ODISE (Xu et al. 2023, arXiv 2303.04803): captioner, feature pyramid, mask generator and mask classifier.

    Args:
        taps: `[part, path, channels, stride]` of each map that is read; `for_base` finds them.
        prompt_shape: Tokens and width of the base's embedded prompt.
        time_width: Of its embedded timestep.
        text_dim: Values of CLIP's vectors.
        strides: Finest and coarsest stride of the pyramid.
        pyramid_width: Its channels.
        width: Channels of queries and mask features.
        queries: How many masks an image has at most.
        encoder_layers: Of the pixel decoder.
        decoder_layers: Of the transformer decoder.
        heads: Of all attentions.
        encoder_feedforward: Width of the pixel decoder's feed-forward layers.
        decoder_feedforward: Width of the transformer decoder's.
        projection: Values in which masks and texts are compared.
        timestep: At which the U-Net reads, with the fixed noise of `read_taps`; None: the clean image.
        timestep_range: Smallest and largest of the noise process; this and the following are recorded by `for_base`.
        base_model: Name of the base.
        base_class: Its class.
        base_config: Its config without defaults.
        base_fingerprint: Hash of class and config.
        noise_kind: Kind of its noise process.
        noise_fingerprint: Hash of its noise process.

    Raises:
        ValueError: For widths and strides that do not fit.
    """

    kind: ClassVar[str | None] = "odise"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["captioner", "pyramid", "generator", "classifier"]  # in any dtype

    @register_to_config
    def __init__(
        self,
        taps: Sequence[Sequence[Any]],
        prompt_shape: Sequence[int],
        time_width: int,
        text_dim: int,
        strides: Sequence[int] = (4, 32),
        pyramid_width: int = 512,
        width: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        heads: int = 8,
        encoder_feedforward: int = 1024,
        decoder_feedforward: int = 2048,
        projection: int = 256,
        timestep: float | None = 0,
        timestep_range: Sequence[float] = (0.0, 999.0),
        base_model: str | None = None,
        base_class: str | None = None,
        base_config: Mapping[str, Any] | None = None,
        base_fingerprint: str | None = None,
        noise_kind: str | None = None,
        noise_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.taps = tuple(Tap(part, str(path), int(channels), int(stride)) for part, path, channels, stride in taps)
        tokens, context = prompt_shape
        self.captioner = ImplicitCaptioner(text_dim, tokens, context, time_width)
        channels, cells = [tap.channels for tap in self.taps], [tap.stride for tap in self.taps]
        self.pyramid = FeaturePyramid(channels, cells, pyramid_width, strides=(strides[0], strides[1]))
        levels = self.pyramid.strides
        self.generator = MaskGenerator(
            [pyramid_width] * len(levels), levels, width, queries, encoder_layers, decoder_layers, heads,
            encoder_feedforward, decoder_feedforward,
        )  # fmt: skip
        self.classifier = MaskClassifier(width, text_dim, projection)

    @classmethod
    def for_base(cls, denoiser: Denoiser, towers: ImageTextEncoder, **options: Any) -> OdiseHead:
        """A new head: taps and widths are looked up, the base is recorded, the background starts as the empty text.

        Args:
            denoiser: The frozen text-to-image model.
            towers: The frozen CLIP, whose vectors caption images and name classes.
            **options: Further arguments of the class.

        Raises:
            TypeError, ValueError: As `find_taps`; for strides of which the base has no maps.
        """
        taps = find_taps(denoiser)
        record = describe_base(denoiser)
        name = record["base_model"]
        prompt = denoiser.condition("", batch=1).kwargs()["encoder_hidden_states"]
        head = cls(
            **{
                **{**record, "base_model": None if name is None else public_name(str(name))},
                "taps": [[tap.part, tap.path, tap.channels, tap.stride] for tap in taps],
                "prompt_shape": list(prompt.shape[1:]),
                "time_width": _time_width(denoiser),
                "text_dim": towers.dim,
                **options,
            }
        )
        with torch.no_grad():
            head.classifier.null.copy_(towers.embed_texts([""]))
        return head

    def check_base(self, denoiser: Denoiser) -> None:
        """Refuse another base than the one the head was trained on.

        Raises:
            TypeError: If it is no `Denoiser`, or none with taps.
            ValueError: If class, config, taps or noise process differ; names both sides.
        """
        refuse_other_base(denoiser, type(self).__name__, {**self.config, **_NO_LAYERS})
        found = find_taps(denoiser)
        if found != self.taps:
            other = next((pair for pair in zip(self.taps, found, strict=False) if pair[0] != pair[1]), None)
            raise ValueError(
                f"This head reads {len(self.taps)} maps, the base has {len(found)}"
                + (f"; the first that differ are {other[0]} and {other[1]}." if other else ".")
                + " Pass the model it was trained on."
            )

    def levels(
        self, denoiser: Denoiser, towers: ImageTextEncoder, pixels: Tensor, batch_size: int | None = None
    ) -> list[Tensor]:
        """The pyramid of images of any size: windows, each captioned by itself, and the mean where they overlap.

        A window is square, as long as the base's own size or the image's shorter side, whichever is less, and is
        resized (bicubic) to the base's size.

        Args:
            denoiser: The base.
            towers: CLIP.
            pixels: `(B, 3, H, W)` in [-1, 1], H and W multiples of the coarsest stride.
            batch_size: Windows read at a time; all if None.

        Returns:
            `(B, pyramid_width, H / stride, W / stride)` a level, finest first, with gradients to this head.

        Raises:
            ValueError: For sizes that do not fit.
        """
        size, target = (pixels.shape[2], pixels.shape[3]), denoiser.image_size
        coarsest = self.pyramid.strides[-1]
        if size[0] % coarsest or size[1] % coarsest:
            raise ValueError(f"Images of {size[0]} x {size[1]} have no whole cells of {coarsest} pixels; pad them.")
        side = min(*target, *size)
        places = window_places(size, side)
        windows = cut_windows(pixels.to(denoiser.device), places, side)
        step = len(windows) if batch_size is None else check_whole("batch_size", batch_size)
        parts = []
        for chunk in windows.split(step):
            if target != (side, side):
                chunk = functional.interpolate(chunk, target, mode="bicubic", align_corners=False)
            context, shift = self.captioner(towers.embed_images(chunk))
            maps = read_taps(
                denoiser, chunk, self.taps, timestep=self.config["timestep"], context=context, time_shift=shift
            )
            parts.append(self.pyramid([one.float() for one in maps], (side, side)))
        joined = [torch.cat(level) for level in zip(*parts, strict=True)]
        pairs = zip(joined, self.pyramid.strides, strict=True)
        return [stitch_windows(level, places, side, size, stride) for level, stride in pairs]

    def forward(
        self, levels: Sequence[Tensor], texts: Tensor, counts: Sequence[int], return_dict: bool = True
    ) -> OdiseOutput | tuple[list[Tensor], list[Tensor]]:
        """Masks and classes of queries.

        Args:
            levels: What `levels` gave.
            texts: `(N, text_dim)`, CLIP's vectors of one prompt a name, class after class.
            counts: Names of each of the K classes.
            return_dict: False for the tuple `(masks, logits)`.

        Raises:
            TypeError: For weights that are not float32.
        """
        if any(p.dtype != torch.float32 for p in self.parameters()):
            raise TypeError("OdiseHead computes in float32; load it in float32, and the base in what dtype you like.")
        found = self.generator(levels)
        pairs = zip(found.queries, found.masks, strict=True)
        vectors = [self.classifier(queries, found.features, masks) for queries, masks in pairs]
        logits = [self.classifier.logits(one, texts, counts) for one in vectors]
        return OdiseOutput(found.masks, logits) if return_dict else (found.masks, logits)


def _time_width(denoiser: Denoiser) -> int:
    layer: nn.Module = denoiser.model.get_submodule("time_embedding.linear_2")
    return int(layer.out_features)  # type: ignore[arg-type]


__all__ = ["OdiseHead", "OdiseOutput"]
