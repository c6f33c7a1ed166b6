"""Networks of stages of the transformers library (ResNet, ConvNeXt, Swin) as sources of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.encoders.family import BackboneFamily
from diffusers_repr.encoders.preprocessing import Statistics, check_planes
from diffusers_repr.encoders.source import Source, by_short_side, check_pooling, pair
from diffusers_repr.hub.identity import config_hash


class BackboneSource(Source):
    """A network of stages with its adapter; a token is a cell of the map of the stage that is read.

    Images are resized to the size of the image processor or the config, by the short side; where neither tells one,
    to the nearest size that the last stage's stride divides.

    Args:
        model: The network, on its device.
        family: Its adapter.
        statistics: Of pixels.
        layer: Stage whose map is read, from 0 or from the end; None: the last, with the network's own global features.
        image_size: (H, W) or a side to resize to; None: see above.
        pooling: `mean`, or None for the network's own global features.
        config: `config.json` as it was loaded.

    Raises:
        ValueError: For a stage, size or pooling that the network does not have.
    """

    def __init__(
        self,
        model: Any,
        family: BackboneFamily,
        statistics: Statistics,
        layer: int | None,
        image_size: int | tuple[int, int] | None,
        pooling: str | None,
        config: Mapping[str, Any],
    ) -> None:
        self.module, self.family = model, family
        self.mean, self.std, self.channels = statistics.mean, statistics.std, int(model.config.num_channels)
        check_planes(statistics, self.channels)
        self.stages = family.stages(model.config.to_dict())
        count = len(self.stages)
        if layer is not None and (isinstance(layer, bool) or not -count <= layer < count):
            raise ValueError(
                f"layer={layer!r}; {type(model).__name__} has stages 0 to {count - 1} (or -{count} to -1 from the "
                "end); None reads the last with the network's own global features."
            )
        self.layer = None if layer is None else layer % count
        self.stage = self.stages[-1 if self.layer is None else self.layer]
        self.dim, self.multiple = self.stage.channels, self.stages[-1].stride
        self.side = statistics.side or family.side(model.config)
        self.image_size = pair(image_size, self.multiple)
        self.pooling = check_pooling(pooling, class_token=False)
        self._config = config_hash(config)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As given; else by the network's own side, or the nearest multiple."""
        if self.image_size is not None:
            return self.image_size
        return by_short_side(size, self.side or min(size), self.multiple)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the stage's map."""
        return self.stage.grid(size)

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """One forward; it ends at the stage that is read."""
        size = (pixels.shape[2], pixels.shape[3])
        inputs = self.family.inputs(self.module, pixels.to(floating_dtype(self.module)))
        own = self.layer is None and self.pooling is None
        with capture(self.module, self.stage.path, stop_early=not own) as tape:
            output = self.module(**inputs)
        tokens = FeatureMap.from_map(self.stage.as_map(tape[self.stage.path], size)).tokens()
        pooled = self.family.global_features(output) if own else None
        return tokens.float().mean(1) if pooled is None else pooled, tokens, self.grid(size)

    def describe(self) -> dict[str, Any]:
        """Class, config, stage, pooling and size."""
        return {
            "model": type(self.module).__name__,
            "config": self._config,
            "layer": self.layer,
            "pooling": self.pooling,
            "image_size": None if self.image_size is None else list(self.image_size),
            "side": self.side,
        }


__all__ = ["BackboneSource"]
