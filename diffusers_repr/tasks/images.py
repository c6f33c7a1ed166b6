"""What a probe reads: images with class ids, and their features as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import Labelled, open_labelled
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.noise_policy import pixel_keys


def class_data(data: Any, role: str) -> Labelled:
    """Labelled images whose targets are class ids, int64; see `open_labelled`."""
    found = data if isinstance(data, Labelled) else open_labelled(data, role)
    return replace(found, targets=found.class_ids())


def join(output: FeatureOutput, layers: Sequence[str]) -> Tensor:
    """Pooled features side by side, `(B, D)` float32: levels in order, within each the layers in order."""
    parts = [one.features[layer].float() for _, one in output.per_level() for layer in layers]
    return torch.cat(parts, dim=1)


def pooled_features(
    extractor: FeatureExtractor,
    data: Labelled,
    batch_size: int,
    prompt: str | None = None,
    class_labels: int | None = None,
    progress_bar: Callable[..., Any] | None = None,
    keys: list[str] | None = None,
) -> tuple[Tensor, FeatureOutput, tuple[int, int]]:
    """Features of all images, `(N, D)` float32 on the CPU; besides them memory holds one batch.

    Args:
        extractor: With a pooling.
        data: The images.
        batch_size: Images read and encoded at a time.
        prompt: One for all images.
        class_labels: One id for all images.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.
        keys: The `pixel_keys` of the images are put here.

    Returns:
        The features, the last batch's output, and the (H, W) of the images.

    Raises:
        ValueError: If images of several sizes come and the extractor keeps their size.
    """
    table: Tensor | None = None
    bar = None if progress_bar is None else progress_bar(total=len(data))
    try:
        channels = extractor.denoiser.image_channels
        for rows, pixels in data.pixels(batch_size, channels, extractor.resize):
            found_keys = pixel_keys(pixels)
            if keys is not None:
                keys += found_keys
            output = extractor.from_pixels(pixels, prompt=prompt, class_labels=class_labels, ids=found_keys)
            features = join(output, extractor.layers)
            if table is None:
                table = torch.empty(len(data), features.shape[1])
            table[rows[0] : rows[-1] + 1] = features.cpu()
            if bar is not None:
                bar.update(len(features))
    finally:
        if bar is not None:
            bar.close()
    assert table is not None
    return table, output, (pixels.shape[2], pixels.shape[3])
