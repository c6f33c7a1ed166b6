"""What heads that classify an image by maps of named layers share: checked maps, brought to the sizes of the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.features.pooling import shrink
from diffusers_repr.heads.base import Head
from diffusers_repr.hub.checks import check_sizes, check_whole
from diffusers_repr.models.layers import wide_dtype
from diffusers_repr.models.outputs import ClassifierOutput, packed


class MapClassifier(Head):
    """Base of heads from maps of named layers to logits `(B, num_classes)`, in float32 or wider.

    Layers are told by their names, never by the order in which they come. A subclass takes `layers`, `channels`,
    `sizes`, `num_classes` and `levels` first, registers its arguments with `register_to_config`, calls
    `check_arguments` and writes `classify`.

    Attributes:
        default_protocol: How it is fitted unless told otherwise; see `PROTOCOLS`.
        takes_steps: Whether protocols of gradient steps fit it.
        reads_once: Whether its maps are those of a plain forward, so that they can be kept and used again.
    """

    default_protocol: ClassVar[str] = "adam-maps"
    takes_steps: ClassVar[bool] = True
    reads_once: ClassVar[bool] = True

    def check_arguments(self, **widths: int) -> None:
        """Check the registered layers, channels, sizes, classes and levels, and the widths given.

        Raises:
            ValueError: For layers, channels and sizes that do not pair up, one class, and numbers below 1.
        """
        layers, channels, sizes = (list(self.config[name]) for name in ("layers", "channels", "sizes"))
        if not layers or len(set(layers)) != len(layers) or not len(layers) == len(channels) == len(sizes):
            raise ValueError(
                f"layers, channels and sizes must go together, each layer once; got {layers}, {channels} and {sizes}."
            )
        named: dict[str, Any] = {}
        for layer, width, size in zip(layers, channels, sizes, strict=True):
            if not isinstance(size, Sequence) or len(size) != 2:
                raise ValueError(f"The size of {layer!r} must be (H, W) in cells; got {size!r}.")
            named |= {f"channels of {layer!r}": width, f"height of {layer!r}": size[0], f"width of {layer!r}": size[1]}
        check_sizes(levels=self.config["levels"], **named, **widths)
        check_whole("num_classes", self.config["num_classes"], 2)

    @classmethod
    def for_maps(cls, maps: Mapping[str, Tensor], num_classes: int, levels: int = 1, **options: Any) -> Any:
        """A new head for maps like these.

        Args:
            maps: Layer path -> `(B, C, h, w)`; of several levels `(levels, B, C, h, w)`. Their size is the head's.
            num_classes: K.
            levels: Noise levels.
            **options: Further arguments of the class.
        """
        shapes = {path: tuple(one.shape) for path, one in maps.items()}
        wrong = {path: shape for path, shape in shapes.items() if len(shape) not in (4, 5)}
        if wrong:
            raise ValueError(
                f"{cls.__name__} takes maps (B, C, h, w), or (levels, B, C, h, w); got {wrong}. Pool by 'map:P', or "
                "not at all."
            )
        channels, sizes = [shape[-3] for shape in shapes.values()], [list(shape[-2:]) for shape in shapes.values()]
        return cls(list(maps), channels, sizes, num_classes, levels, **options)

    def take(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's maps `(levels, B, C, *size)` by layer, means over cells, in float32 or wider.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        name, levels, dtype = type(self).__name__, int(self.config["levels"]), wide_dtype(self)
        taken: dict[str, Tensor] = {}
        places = zip(self.config["layers"], self.config["channels"], self.config["sizes"], strict=True)
        for path, channels, size in places:
            if path not in features:
                raise ValueError(f"{name} reads layer {path!r}, which is not among the features {list(features)}.")
            x = features[path]
            x = x[None] if levels == 1 and x.ndim == 4 else x
            fits = x.ndim == 5 and x.shape[0] == levels and x.shape[2] == channels
            if not fits or x.shape[3] < size[0] or x.shape[4] < size[1]:
                lead = "(B" if levels == 1 else f"({levels}, B"
                raise ValueError(
                    f"{name} takes {path!r} as {lead}, {channels}, h, w) of at least {size[0]} x {size[1]} cells; got "
                    f"{tuple(features[path].shape)}."
                )
            small = shrink(x.to(dtype).flatten(0, 1), (int(size[0]), int(size[1])))
            taken[path] = small.unflatten(0, x.shape[:2])
        rows = {x.shape[1] for x in taken.values()}
        if len(rows) > 1:
            raise ValueError(f"The features have {sorted(rows)} rows; {name} takes one batch.")
        return taken

    def classify(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Logits `(B, num_classes)` of what `take` gave."""
        raise NotImplementedError

    def forward(
        self, features: Mapping[str, Tensor], return_dict: bool | None = None
    ) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits `(B, num_classes)`, float32 whatever the dtype of head and features (float64 for a head of that).

        Args:
            features: Layer path -> map `(B, C, h, w)`; of several levels `(levels, B, C, h, w)`, as
                `FeatureExtractor` gives them. Other layers are ignored.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        maps = self.take(features)
        with torch.autocast(next(iter(maps.values())).device.type, enabled=False):
            logits = self.classify(maps)
        return packed(logits, ClassifierOutput, return_dict)


__all__ = ["MapClassifier"]
