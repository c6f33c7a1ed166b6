"""What a probe reads: images with class ids, and their features as one matrix, or as maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import Labelled, open_labelled
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.features.pooling import leaves_maps, pool
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.tasks.reading import Condition, bar_of, resize_of

# What a head takes of some images: one matrix, or maps by layer.
Inputs = Tensor | dict[str, Tensor]


def class_data(data: Any, role: str) -> Labelled:
    """Labelled images whose targets are class ids, int64; see `open_labelled`."""
    found = open_labelled(data, role)
    return replace(found, targets=found.class_ids())


def class_accuracies(guesses: Tensor, targets: Tensor) -> dict[str, float]:
    """`accuracy`, and its mean over the classes that have images, `balanced_accuracy`; both of class ids `(N,)`."""
    right = guesses == targets
    each = [float(right[targets == label].double().mean()) for label in targets.unique()]
    return {"accuracy": float(right.double().mean()), "balanced_accuracy": sum(each) / len(each)}


def join(output: FeatureOutput, layers: Sequence[str]) -> Tensor:
    """Pooled features side by side, `(B, D)` float32: levels in order, within each the layers in order."""
    parts = [one.features[layer].float() for _, one in output.per_level() for layer in layers]
    return torch.cat(parts, dim=1)


def head_inputs(output: FeatureOutput, layers: Sequence[str]) -> Inputs:
    """What a head takes of pooled features: `join` of vectors; maps by layer, `(levels, B, C, h, w)` float32."""
    if not leaves_maps(output.pooling):
        return join(output, layers)
    levels = [one for _, one in output.per_level()]
    return {layer: torch.stack([one.as_map(layer).float() for one in levels]) for layer in layers}


def take_images(inputs: Inputs, rows: slice) -> Inputs:
    """The inputs of some images."""
    return {k: v[:, rows] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def move_inputs(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device."""
    return {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)


def read_pooled(
    source: FeatureSource,
    pixels: Tensor,
    pooling: str,
    prompt: str | Sequence[str] | None = None,
    class_labels: int | None = None,
    ids: Sequence[str] | None = None,
) -> FeatureOutput:
    """Pooled features of images that have the source's size.

    Args:
        source: A `FeatureExtractor` with this pooling, or a source of maps, which are pooled here.
        pixels: `(B, C, H, W)` in [-1, 1].
        pooling: As in `pool`.
        prompt: One for all images, or one each.
        class_labels: One id for all images.
        ids: A name an image.
    """
    if isinstance(source, FeatureExtractor):
        return source.from_pixels(pixels, prompt=prompt, class_labels=class_labels, ids=ids)
    output = source(pixels / 2 + 0.5, prompt=prompt, class_labels=class_labels, ids=ids)
    parts = [
        {layer: pool(one[layer], pooling, one.places.get(layer)) for layer in source.layers}
        for _, one in output.per_level()
    ]
    found = {layer: torch.stack([part[layer] for part in parts]) for layer in source.layers}
    features = found if isinstance(output.level, list) else {layer: value[0] for layer, value in found.items()}
    places = {} if leaves_maps(pooling) else output.places  # tokens became maps
    return replace(output, features=features, pooling=pooling, images=None, places=places)


def pooled_features(
    source: FeatureSource,
    data: Labelled,
    pooling: str,
    batch_size: int,
    condition: Condition = (None, None),
    progress_bar: Callable[..., Any] | None = None,
    keys: list[str] | None = None,
) -> tuple[Inputs, FeatureOutput, tuple[int, int]]:
    """Features of all images, as `head_inputs` gives them, on the CPU; besides them memory holds one batch.

    Args:
        source: As in `read_pooled`.
        data: The images.
        pooling: Likewise.
        batch_size: Images read and encoded at a time.
        condition: Prompt and class label of every image.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.
        keys: The `pixel_keys` of the images are put here.

    Returns:
        The features, the last batch's output, and the (H, W) of the images.

    Raises:
        ValueError: If images of several sizes come and the source keeps their size.
    """
    table: Inputs | None = None
    channels, resize = source.denoiser.image_channels, resize_of(source)
    with bar_of(progress_bar, len(data)) as tell:
        for rows, pixels in data.pixels(batch_size, channels, resize):
            found_keys = pixel_keys(pixels)
            if keys is not None:
                keys += found_keys
            output = read_pooled(source, pixels, pooling, *condition, found_keys)
            found = head_inputs(output, source.layers)
            table = _empty(found, len(data)) if table is None else table
            _put(take_images(table, slice(rows[0], rows[-1] + 1)), found)
            tell(len(rows))
    assert table is not None
    return table, output, (pixels.shape[2], pixels.shape[3])


def _empty(found: Inputs, rows: int) -> Inputs:
    """Room for the inputs of so many images."""
    if isinstance(found, dict):
        return {k: torch.empty(v.shape[0], rows, *v.shape[2:]) for k, v in found.items()}
    return torch.empty(rows, found.shape[1])


def _put(places: Inputs, found: Inputs) -> None:
    if isinstance(places, dict) and isinstance(found, dict):
        for layer, one in places.items():
            one.copy_(found[layer])
    elif isinstance(places, Tensor) and isinstance(found, Tensor):
        places.copy_(found)
