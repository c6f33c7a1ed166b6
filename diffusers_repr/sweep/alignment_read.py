"""Pooled features of many layers and levels, and of an encoder, from one forward an image and level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusers_repr.data.labelled import ImageRows
from diffusers_repr.denoiser import Denoiser, Layer, list_layers
from diffusers_repr.encoders import Encoder
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.metrics.encoding import pick, read_shared
from diffusers_repr.noise import NoiseLevel

_ENCODER = ""  # no layer has this name


@dataclass(frozen=True)
class Pass:
    """A part of the sweep whose features are held at once.

    Attributes:
        layers: Paths.
        levels: Indices into the sweep's levels.
    """

    layers: tuple[str, ...]
    levels: tuple[int, ...]


def plan_passes(layers: Mapping[str, Layer], levels: int, rows: int, memory: float) -> list[Pass]:
    """As few passes over the images as the memory allows.

    A pass takes whole levels while they fit; where not even one level fits, its layers are parted, and the network
    runs once more for each part.

    Args:
        layers: Path -> layer.
        levels: Number of levels.
        rows: Images.
        memory: Bytes for float32 features.

    Raises:
        ValueError: If the features of one layer at one level do not fit.

    Example:
        >>> table = {name: Layer(name, "map", 4, (1, 1), 1.0, 1.0, 0, "Conv2d") for name in ("a", "b")}
        >>> [(p.layers, p.levels) for p in plan_passes(table, 3, rows=10, memory=10 * 4 * 4 * 4)]
        [(('a', 'b'), (0, 1)), (('a', 'b'), (2,))]
    """
    sizes = {path: 4 * rows * layer.channels for path, layer in layers.items()}
    together = int(memory // sum(sizes.values()))
    if together:
        every = tuple(layers)
        return [Pass(every, tuple(range(at, min(at + together, levels)))) for at in range(0, levels, together)]
    parts: list[list[str]] = [[]]
    for path, size in sizes.items():
        if size > memory:
            raise ValueError(
                f"Features of layer {path!r} at one level take {size / 2**30:.3g} GiB for {rows} images; raise "
                "memory_gib or take fewer samples."
            )
        if sum(sizes[p] for p in parts[-1]) + size > memory:
            parts.append([])
        parts[-1].append(path)
    return [Pass(tuple(part), (level,)) for level in range(levels) for part in parts]


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set of images, on the CPU, the same on every process.

    Attributes:
        denoiser: Layer -> `(T, N, D)` float32.
        encoder: `(N, D)` float32; None if it was not asked for.
        image_size: (H, W) of the images.
        images_hash: Of the pixels of all images, whatever their order.
        keys: Of the pixels of each image.
    """

    denoiser: dict[str, Tensor]
    encoder: Tensor | None
    image_size: tuple[int, int]
    images_hash: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Reader:
    """How images are read.

    Attributes:
        extractor: With mean pooling and the batch size; its layers and levels are replaced for every pass.
        encoder: The encoder.
        which: `global`, or `tokens`, whose mean is taken.
        condition: Further arguments of the extractor's call.
        batch_size: Images a forward.
        step: Called after every batch of images.
    """

    extractor: FeatureExtractor
    encoder: Encoder
    which: str
    condition: Mapping[str, Any]
    batch_size: int
    step: Callable[[], object]

    @property
    def denoiser(self) -> Denoiser:
        """Of the extractor."""
        return self.extractor.denoiser

    def read(
        self, images: ImageRows, rows: Sequence[int], part: Pass, levels: Sequence[NoiseLevel], with_encoder: bool
    ) -> SetFeatures:
        """Features of a pass; each process reads a share of the rows, and all get all of them.

        Args:
            images: The images.
            rows: Which of them.
            part: Layers and levels.
            levels: The levels that the indices of `part` mean.
            with_encoder: Whether the encoder's features are made, too.

        Raises:
            ValueError: For images that differ in size or do not suit the model, on every process.
            FloatingPointError: For features that are not finite.
        """
        extractor = self.extractor.replace(layers=list(part.layers), timestep=[levels[at] for at in part.levels])

        def make(pixels: Tensor) -> dict[str, Tensor]:
            output = extractor.from_pixels(pixels, **self.condition)
            made = {path: output[path].transpose(0, 1) for path in part.layers}  # (n, T, D)
            if with_encoder:
                made[_ENCODER] = pick(self.encoder.encode_pixels(pixels), self.which)
            return made

        read = read_shared(
            images,
            rows,
            make,
            [*part.layers, *([_ENCODER] if with_encoder else [])],
            channels=self.denoiser.image_channels,
            image_size=self.extractor.image_size,
            batch_size=self.batch_size,
            step=self.step,
        )
        encoded = read.made.pop(_ENCODER, None)
        features = {path: values.transpose(0, 1) for path, values in read.made.items()}
        return SetFeatures(features, encoded, read.image_size, read.images_hash, read.keys)


def choose_layers(
    denoiser: Denoiser, layers: Sequence[str] | str | None, image_size: tuple[int, int]
) -> dict[str, Layer]:
    """Path -> layer, in execution order; those of `list_layers` if None.

    Raises:
        ValueError: For a layer that gives no image.
    """
    table = {layer.path: layer for layer in list_layers(denoiser, image_size, "blocks")}
    if layers is None:
        return table
    asked = [layers] if isinstance(layers, str) else list(layers)
    if not all(path in table for path in asked):
        table = {layer.path: layer for layer in list_layers(denoiser, image_size, "all")}
    for path in asked:
        if path not in table:
            raise ValueError(
                f"Layer {path!r} returns no image, or runs more than once a forward; `list_layers(denoiser)` shows "
                "what can be compared."
            )
    return {path: layer for path, layer in table.items() if path in asked}
