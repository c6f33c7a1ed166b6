"""Streams of pooled features for selection: one forward an image batch and level serves all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.data.labelled import Labelled
from diffusers_repr.data.overlap import Overlap
from diffusers_repr.denoiser import Denoiser, Layer
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.features.pooling import pool, pooled_size
from diffusers_repr.noise import NoiseLevel

Stream = Iterator[tuple[int, slice, dict[str, Tensor]]]


class Progress:
    """A bar that counts forwards; silent if not wanted.

    Args:
        shown: Whether to draw it.
    """

    def __init__(self, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=0, desc="selection", unit="forward", disable=not shown)
        self.forwards = 0

    def expect(self, stage: str, forwards: int) -> None:
        """Announce a stage."""
        self.bar.set_description(stage)
        self.bar.total += forwards
        self.bar.refresh()

    def step(self) -> None:
        """Count one forward."""
        self.forwards += 1
        self.bar.update(1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


@dataclass(frozen=True)
class Reader:
    """How features are read; the same for every stage of a selection.

    Attributes:
        denoiser: The model.
        layers: In execution order.
        pooling: As in `FeatureExtractor`, not None.
        batch_size: Images a forward.
        condition: `prompt`, `class_labels`, `embeddings` for `FeatureExtractor.batches`.
        image_size: As in `FeatureExtractor`.
        progress: Counts forwards.
        overlap: Learns which images there are.
    """

    denoiser: Denoiser
    layers: Mapping[str, Layer]
    pooling: str
    batch_size: int
    condition: Mapping[str, Any]
    image_size: tuple[int, int] | int | None
    progress: Progress
    overlap: Overlap = field(default_factory=Overlap)

    def dim(self, path: str) -> int:
        """Length of the pooled feature of a layer."""
        return self.layers[path].channels * pooled_size(self.pooling)

    def forwards(self, data: Labelled, levels: int) -> int:
        """Forwards that `read` makes."""
        full, rest = divmod(len(data), self.batch_size)
        return full * levels + -(-rest * levels // self.batch_size)

    def read(
        self, data: Labelled, levels: Sequence[NoiseLevel], noise: str, seed: int, paths: Sequence[str]
    ) -> Iterator[tuple[slice, Stream]]:
        """`(rows, stream)` for each batch of images; the stream must be used up before the next batch.

        A stream gives `(level, part, features)`: the index of the level, which of `rows` these are, and layer path ->
        pooled float32 features `(n, D)`. Run it without gradients and with the model in eval mode.
        """
        extractor = FeatureExtractor(
            self.denoiser,
            list(paths),
            list(levels),
            noise,
            batch_size=self.batch_size,
            seed=seed,
            image_size=self.image_size,
        )
        for rows, images in data.batches(self.batch_size):
            pixels = to_pixels(images, self.denoiser.image_channels, self.image_size, range(rows.start, rows.stop))
            keys = pixel_keys(pixels)
            self.overlap.add(data, rows, keys)
            yield rows, self._stream(extractor, pixels, keys)

    def _stream(self, extractor: FeatureExtractor, pixels: Tensor, keys: Sequence[str]) -> Stream:
        count = len(pixels)
        for batch in extractor.batches(pixels, ids=keys, **self.condition):
            size = (batch.x_t.shape[2], batch.x_t.shape[3])

            def pooled(feature: Tensor, path: str, size: tuple[int, int] = size) -> Tensor:
                place = self.denoiser.token_grid(path, feature.shape[1], size) if feature.ndim == 3 else None
                return pool(feature, self.pooling, place)

            with extractor.reading(), capture(self.denoiser.model, extractor.layers, transform=pooled) as tape:
                self.denoiser.predict(batch.x_t, batch.level, batch.condition)
            self.progress.step()
            for level, part, at in _levels(batch.cells, count):
                yield level, part, {path: feature[at] for path, feature in tape.features.items()}


def _levels(cells: Sequence[int], count: int) -> Iterator[tuple[int, slice, slice]]:
    """`(level, images, rows)` for each run of one level among the rows of a forward (`level * count + image`)."""
    start = 0
    while start < len(cells):
        level, first = divmod(cells[start], count)
        length = min(len(cells) - start, count - first)
        yield level, slice(first, first + length), slice(start, start + length)
        start += length
