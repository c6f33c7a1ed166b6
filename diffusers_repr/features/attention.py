"""Attention maps of images: noised, averaged over an ensemble, ready to be laid on the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture.attention import GIB, AttentionTokens, Heads, capture_attention, check_keys, too_much
from diffusers_repr.capture.attention_memory import attention_memory
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.noise import LevelLike, NoiseLevel


@dataclass(frozen=True)
class AttentionOutput:
    """Attention maps of a batch of images.

    Attributes:
        maps: Layer path -> probabilities `(B, queries, keys)` float32, rows sum to 1; `(B, heads, queries, keys)` with
            `heads=None`. With a list of timesteps, one more dimension in front. With `keys=` these columns,
            whose rows sum to less.
        level: The resolved noise level; the list of them with a list of timesteps.
        tokens: Layer path -> what rows and columns are, and the order of text and image.
        grids: Layer path -> (H, W) of the image tokens.
        image_queries: Layer path -> the rows that are image tokens, row by row of the grid.
        image_keys: Layer path -> the columns that are image tokens; None in cross-attention, whose columns are text,
            and where columns were chosen.
        keys: The columns that were chosen, in the order of the maps'; None: all.
    """

    maps: Mapping[str, Tensor]
    level: NoiseLevel | list[NoiseLevel]
    tokens: Mapping[str, AttentionTokens]
    grids: Mapping[str, tuple[int, int]]
    image_queries: Mapping[str, slice]
    image_keys: Mapping[str, slice | None]
    keys: tuple[int, ...] | None = None

    def __getitem__(self, layer: str) -> Tensor:
        return self.maps[layer]

    def as_map(self, layer: str) -> Tensor:
        """`(B, keys, H, W)`: for each key (of the chosen ones), how much every place of the image attends to it.

        Raises:
            KeyError: For a layer that was not asked for.
            ValueError: Where the order of the tokens is not known.
        """
        if layer not in self.maps:
            raise KeyError(f"Layer {layer!r} was not read; there are {', '.join(self.maps)}.")
        if layer not in self.grids:
            raise ValueError(f"Where the image lies among the tokens of {layer!r} is not known: {self.tokens[layer]}.")
        return FeatureMap(self.maps[layer], self.grids[layer], self.image_queries[layer].start).as_map()


@torch.no_grad()
def attention_maps(
    source: Denoiser | FeatureExtractor,
    images: Any,
    layers: str | Sequence[str],
    timestep: LevelLike | Sequence[LevelLike] | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    embeddings: Mapping[str, Any] | None = None,
    ids: Sequence[Any] | None = None,
    heads: Heads = "mean",
    chunk: int | None = None,
    max_bytes: int = 4 * GIB,
    keys: Sequence[int] | None = None,
    **settings: Any,
) -> AttentionOutput:
    """Attention probabilities of named layers for images, averaged over the ensemble.

    Args:
        source: A denoiser, or an extractor whose settings (noise policy, ensemble, seed, batch size) are used.
        images: As for `FeatureExtractor`.
        layers: Attention modules; `attention_layers(denoiser.model)` lists them.
        timestep: Training timestep or `NoiseLevel`, or a list; the extractor's own if None.
        prompt: As for `FeatureExtractor`.
        class_labels: As for `FeatureExtractor`.
        embeddings: As for `FeatureExtractor`.
        ids: As for `FeatureExtractor`.
        heads: `mean` over the heads, or None to keep them.
        chunk: Query rows computed at once; see `capture_attention`.
        max_bytes: Refuse to hold more than this; checked before the network runs. `attention_memory` tells how much
            the maps of one forward take.
        keys: Columns of the maps to keep, such as `[5]` for the sixth token of the prompt in cross-attention; None
            keeps all. What the columns are is in `tokens` and, where text and image are in one softmax, its order.
        **settings: Of `FeatureExtractor`: `noise`, `ensemble_size`, `batch_size`, `seed`, `output_device`, ...

    Raises:
        ValueError: As `FeatureExtractor` and `capture_attention`.
        MemoryError: If the maps need more than `max_bytes`.
    """
    extractor = _extractor(source, layers, timestep, settings)
    denoiser = extractor.denoiser
    require_images(denoiser, "Attention maps")
    check_keys(keys)
    pixels = to_pixels(images, denoiser.image_channels, extractor.resize)
    cells = len(pixels) * len(extractor.levels)
    members = cells * extractor.ensemble_size
    size = (pixels.shape[2], pixels.shape[3])
    need = attention_memory(
        denoiser, extractor.layers, size, cells + min(members, extractor.batch_size or members), heads, keys
    )
    if need > max_bytes:
        raise MemoryError(too_much(need, max_bytes, extractor.layers[-1], heads, keys))
    totals: dict[str, Tensor] = {}
    target = extractor.output_device or denoiser.device
    with extractor.reading():
        for batch in extractor.batches(pixels, prompt, class_labels, embeddings, ids):

            def add(found: Tensor, path: str, places: list[int] = batch.cells) -> None:
                if path not in totals:
                    totals[path] = torch.zeros(cells, *found.shape[1:], dtype=found.dtype, device=target)
                totals[path].index_add_(0, torch.tensor(places, device=target), found.to(target))

            with capture_attention(
                denoiser.model, extractor.layers, heads, chunk, transform=add, max_bytes=max_bytes, keys=keys
            ) as tape:
                denoiser.predict(batch.x_t, batch.level, batch.condition)
    maps = {layer: totals[layer] / extractor.ensemble_size for layer in extractor.layers}
    if extractor.many:
        maps = {layer: value.unflatten(0, (len(extractor.levels), len(pixels))) for layer, value in maps.items()}
    small = (size[0] // denoiser.stride, size[1] // denoiser.stride)
    places = {layer: _place(denoiser, layer, tape.tokens[layer], small) for layer in extractor.layers}
    known = {layer: place for layer, place in places.items() if place is not None}
    return AttentionOutput(
        maps,
        extractor.levels if extractor.many else extractor.levels[0],
        dict(tape.tokens),
        {layer: place[0] for layer, place in known.items()},
        {layer: place[1] for layer, place in known.items()},
        {
            layer: None if keys is not None or tape.tokens[layer].order == "cross" else place[1]
            for layer, place in known.items()
        },
        None if keys is None else tuple(keys),
    )


def _extractor(
    source: Denoiser | FeatureExtractor, layers: str | Sequence[str], timestep: Any, settings: Mapping[str, Any]
) -> FeatureExtractor:
    wrong = [name for name in ("pooling", "where") if name in settings]
    if wrong:
        raise TypeError(f"{wrong[0]}= says how features are read; attention maps have none.")
    if isinstance(source, FeatureExtractor):
        changes = {"layers": layers, **({} if timestep is None else {"timestep": timestep}), **settings}
        return source.replace(**changes, where="output", pooling=None)
    if timestep is None:
        raise TypeError("timestep is needed with a Denoiser (larger is noisier), e.g. timestep=261.")
    return FeatureExtractor(source, layers, timestep, **settings)


def _place(
    denoiser: Denoiser, path: str, tokens: AttentionTokens, size: tuple[int, int]
) -> tuple[tuple[int, int], slice] | None:
    """Grid of the image tokens and their rows, for x_0 of `size`."""
    if tokens.order == "unknown":
        return None
    found = denoiser.token_grid(path, tokens.image, size)
    if found is None:
        return None
    grid, start = found  # text inside the layer's first input stands in front
    start += tokens.text if tokens.order == "text_image" else 0
    return grid, slice(start, start + grid[0] * grid[1])
