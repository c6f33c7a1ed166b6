"""Alignment and uniformity of features on the unit sphere (Wang and Isola 2020, arXiv 2005.10242), under noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import open_images
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.gather import failing_together, gather_rows, own_rows

_OTHER = 2**34  # from the seed of the first noise draw to that of the second


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """`E ||f - f'||^2` of unit vectors, row by row: 0 where the two draws agree, 4 at most; smaller is better.

    Args:
        first: `(n, D)`, not yet of unit length.
        second: The same images under another draw of noise.

    Example:
        >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(2., dtype=torch.float64)
    """
    return (_unit(first) - _unit(second)).square().sum(1).mean()


def uniformity(features: Tensor) -> Tensor:
    """`log E exp(-2 ||f_i - f_j||^2)` over pairs i < j of unit vectors: 0 where all are one; smaller is better.

    Args:
        features: `(n, D)`, not yet of unit length, n at least 2.

    Raises:
        ValueError: For fewer than two rows.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-5.0, 0.0]]))
        tensor(-8., dtype=torch.float64)
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"uniformity compares pairs of rows (n, D); got {tuple(features.shape)}.")
    distances = torch.nn.functional.pdist(_unit(features)).square()
    return (-2 * distances).logsumexp(0) - torch.tensor(float(len(distances)), dtype=torch.float64).log()


@dataclass(frozen=True)
class AlignmentUniformity:
    """What `alignment_uniformity` measured of one layer at one level.

    Attributes:
        layer: Its path.
        timestep: Of the level.
        alignment: Of the same image under two draws of noise, 0 to 4.
        uniformity: Of a batch, -8 to 0, the mean of both draws.
        batch_size: Images a batch: uniformity depends on it, and compares under one alone.
    """

    layer: str
    timestep: float
    alignment: float
    uniformity: float
    batch_size: int


def alignment_uniformity(
    extractor: FeatureExtractor,
    images: Any,
    batch_size: int = 128,
    *,
    prompt: str | None = None,
    class_labels: int | None = None,
    progress_bar: Callable[..., Any] | None = None,
) -> list[AlignmentUniformity]:
    """How little noise moves features, and how well they spread, as DDAE measures (arXiv 2303.09769).

    Each image is read under two draws of noise. Both numbers are taken over batches of `batch_size` in the order of
    the images and averaged, weighted by their images; under `accelerate launch` the processes share the reading, and
    the batches are those of one process. A last image alone joins the batch before it.

    Args:
        extractor: With a pooling, and noise that is drawn an image: `per_image` or `fresh`.
        images: See `open_images`.
        batch_size: Images of a batch, 2 or more.
        prompt: One for all images.
        class_labels: One id for all images.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.

    Returns:
        One for every layer and level of the extractor, level by level.

    Raises:
        ValueError: For features that are not pooled, noise that two draws share, or fewer than two images.
    """
    check_whole("batch_size", batch_size, 2)
    data = open_images(images, "images")
    if extractor.pooling is None:
        raise ValueError("alignment_uniformity takes vectors; give the extractor a pooling, such as 'mean'.")
    if extractor.noise.policy in ("clean", "shared"):
        raise ValueError(
            f"noise={extractor.noise.policy!r}: alignment is that of an image under two draws of its own noise; take "
            "'per_image' or 'fresh'."
        )
    if len(data) < 2:
        raise ValueError(f"alignment_uniformity compares images; {data} has {len(data)}.")
    readers = [extractor, extractor.replace(seed=extractor.seed + _OTHER)]
    condition: dict[str, Any] = {"prompt": prompt, "class_labels": class_labels}
    mine = own_rows(len(data))
    kept: list[list[list[list[Tensor]]]] = [[], []]  # draw -> batch -> level -> layer
    bar = None if progress_bar is None else progress_bar(total=len(mine))
    with failing_together():
        for _, pixels in data.pixels(batch_size, extractor.denoiser.image_channels, extractor.resize, mine):
            keys = pixel_keys(pixels)
            for draws, reader in zip(kept, readers, strict=True):
                output = reader.from_pixels(pixels, **condition, ids=keys)
                levels = [[one.features[path].cpu() for path in extractor.layers] for _, one in output.per_level()]
                draws.append(levels)
            if bar is not None:
                bar.update(len(pixels))
    if bar is not None:
        bar.close()
    index, found = torch.tensor(mine, dtype=torch.int64), []
    for at, level in enumerate(extractor.levels):
        for place, path in enumerate(extractor.layers):
            parts = [torch.cat([batch[at][place] for batch in draws]) if mine else torch.zeros(0) for draws in kept]
            both = [gather_rows(part, index, len(data)) for part in parts]
            found.append(AlignmentUniformity(path, float(level.timestep), *_measured(both, batch_size), batch_size))
    return found


def _measured(both: list[Tensor], batch_size: int) -> tuple[float, float]:
    """Alignment and uniformity over batches, weighted by their rows."""
    count, (first, second) = len(both[0]), both
    edges = [*range(0, count, batch_size), count]
    if edges[-1] - edges[-2] == 1 and len(edges) > 2:
        del edges[-2]
    sums = torch.zeros(2, dtype=torch.float64)
    for start, end in zip(edges, edges[1:], strict=False):
        a, b = first[start:end], second[start:end]
        spread = (uniformity(a) + uniformity(b)) / 2
        sums += (end - start) * torch.stack([alignment(a, b), spread])
    return float(sums[0]) / count, float(sums[1]) / count


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)


__all__ = ["AlignmentUniformity", "alignment", "alignment_uniformity", "uniformity"]
