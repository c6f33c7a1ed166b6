"""From a data set to a feature store: which rows there are; how they are written, `store/write.py` says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import Policy, pixel_keys
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.recipe import extraction_recipe
from diffusers_repr.store.feature_layout import Column, FeatureLayout
from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.manifest import recipe_hash
from diffusers_repr.store.parquet import row_bytes
from diffusers_repr.store.write import Plan, Spans, check_folder, choose_shard_size, write_store

DTYPES = ("float32", "float16")
_SHARD_ROWS = 1000  # of a shard whose size nobody chose, at most
_IMAGES_AT_ONCE = 32  # without a batch_size


@dataclass(frozen=True)
class _Extraction:
    """One extraction, the same on every process."""

    extractor: FeatureExtractor
    data: ImageData
    out: Path
    layout: FeatureLayout
    recipe: dict[str, Any]
    prompt: str | None
    class_label: int | None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that every image must have."""
        height, width = self.recipe["features"]["image_size"]
        return height, width

    def rows(self, spans: Spans) -> Iterator[dict[str, Any]]:
        """See `Plan`; a batch of the extractor at a time."""
        at_once = self.extractor.batch_size or _IMAGES_AT_ONCE
        for start, stop in spans:
            for images, labels in self.data.batches(at_once, start, stop):
                pixels = _pixels(self, images, start)
                hashes = pixel_keys(pixels)
                prompts = _prompts(self.prompt, self.data, labels)
                output = self.extractor.from_pixels(pixels, prompt=prompts, class_labels=self.class_label, ids=hashes)
                numbers = np.arange(start, start + len(images))
                yield {"row": numbers, "image_hash": hashes, "label": labels, **_stored(self, output)}
                start += len(images)

    def check_kept(self, shard: int) -> None:
        """The first image of a finished shard must be that of the data set."""
        with pq.ParquetFile(self.out / self.layout.path(shard)) as file:
            stored = file.read_row_group(0, columns=["image_hash"])["image_hash"][0].as_py()
        start = self.layout.span(shard)[0]
        images, _ = next(self.data.batches(1, start))
        if pixel_keys(_pixels(self, images, start))[0] != stored:
            raise FileExistsError(
                f"Row {start} of {self.data.name} is another image than the one in {str(self.out)!r}: the data set "
                "has changed since. Nothing was changed; give another --out."
            )


def extract_to_store(
    extractor: FeatureExtractor,
    data: ImageData,
    out: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    class_label: int | None = None,
    dtype: str = "float32",
    shard_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> FeatureStore:
    """Write features of a data set to a folder; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards. A shard holds fixed rows and depends on nothing but the
    recipe, so neither a kill nor the number of processes changes what is in it. Memory holds one batch.

    Args:
        extractor: Layers, levels, noise, pooling, seed; its `batch_size` bounds the memory.
        data: Images, from `load_images`.
        out: Folder of the store; new, empty, or of an earlier call with the same recipe.
        prompt: Of text models; `{label}` stands for the image's class name.
        class_label: Of class-conditional models: one id for all images.
        dtype: Of the stored features: `float32` or `float16`.
        shard_size: Rows of a shard; what an earlier call chose, else at most 1000 rows and 256 MiB, if None.
        limit: The first rows only.
        progress: Show a bar on the main process.

    Raises:
        FileExistsError: If the folder holds another recipe (tells what differs), or is no store of features.
        ValueError: If images differ in size, features overflow `dtype`, or settings do not fit.
        OSError: If the disk is full; what is written stays valid.
    """
    work = _prepare(extractor, data, Path(out), prompt, class_label, dtype, shard_size, limit)
    plan = Plan(FeatureStore, work.out, work.layout, work.recipe, work.rows, progress=progress, what="extract")
    write_store(replace(plan, check_kept=work.check_kept))
    return FeatureStore.open(work.out)


def _prepare(
    extractor: FeatureExtractor,
    data: ImageData,
    out: Path,
    prompt: str | None,
    class_label: int | None,
    dtype: str,
    shard_size: int | None,
    limit: int | None,
) -> _Extraction:
    require_images(extractor.denoiser, "Stores of features")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; features are stored as {' or '.join(DTYPES)} (Arrow has no bfloat16).")
    if extractor.noise.policy == "fresh":
        allowed = ", ".join(p for p in get_args(Policy) if p != "fresh")
        raise ValueError(
            f"noise='fresh' goes on from call to call, so a store could not be resumed; use {allowed}. "
            "Another --seed gives per_image another draw."
        )
    for name, value in (("shard_size", shard_size), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
    if prompt is not None and "{label}" in prompt and data.label_names is None:
        raise ValueError(f"The prompt {prompt!r} asks for the class name, but {data.name} has no label names.")
    check_folder(out)
    extractor = extractor.replace(output_device="cpu", progress_bar=None)
    rows = len(data) if limit is None else min(limit, len(data))
    size, shapes = _probe(extractor, data, prompt, class_label)
    recipe = extraction_recipe(
        extractor, data, rows=rows, image_size=size, dtype=dtype, prompt=prompt, class_label=class_label
    )
    columns = _columns(extractor, shapes)
    size_of_row = row_bytes([column.shape for column in columns], dtype)
    shard_size = choose_shard_size(FeatureStore, out, _SHARD_ROWS, size_of_row, shard_size)
    label = None
    if data.label_column is not None:
        label = datasets.ClassLabel(names=data.label_names) if data.label_names else datasets.Value("int64")
    layout = FeatureLayout(rows, shard_size, recipe_hash(recipe), data.split, columns, dtype, label)
    return _Extraction(extractor, data, out, layout, recipe, prompt, class_label)


def _probe(
    extractor: FeatureExtractor, data: ImageData, prompt: str | None, class_label: int | None
) -> tuple[tuple[int, int], FeatureOutput]:
    """The size of the first image and the shapes of its features, from one cheap call."""
    images, labels = next(data.batches(1))
    pixels = to_pixels(images, extractor.denoiser.image_channels, extractor.resize)
    one = extractor.replace(timestep=extractor.levels[0], ensemble_size=1)
    output = one.from_pixels(pixels, prompt=_prompts(prompt, data, labels), class_labels=class_label)
    return (pixels.shape[2], pixels.shape[3]), output


def _columns(extractor: FeatureExtractor, found: FeatureOutput) -> tuple[Column, ...]:
    times = [float(level.timestep) for level in extractor.levels]
    names = [f"{time:.6g}" for time in times]
    if len(set(names)) < len(names):
        names = [repr(time) for time in times]
    if len(set(names)) < len(names):
        raise ValueError(f"Timesteps {times} are not distinct; each can be stored once.")
    columns = []
    for layer in extractor.layers:
        grid, text = found.places.get(layer, (None, 0)) if extractor.pooling is None else (None, 0)
        for level, (time, name) in enumerate(zip(times, names, strict=True)):
            shape = tuple(found[layer].shape[1:])
            columns.append(Column(f"{layer}@t{name}", layer, level, time, shape, grid, text))
    return tuple(columns)


def _pixels(work: _Extraction, images: list[Any], start: int) -> Tensor:
    extractor = work.extractor
    sizes = {(image.height, image.width) for image in images}
    if extractor.resize is None and sizes != {work.image_size}:
        row, image = next((i, m) for i, m in enumerate(images) if (m.height, m.width) != work.image_size)
        raise ValueError(
            f"Row {start + row} of {work.data.name} is {image.height} x {image.width} (H x W), the first image is "
            f"{work.image_size[0]} x {work.image_size[1]}: pass image_size (--image_size) to resize all to one size."
        )
    return to_pixels(images, extractor.denoiser.image_channels, extractor.resize)


def _prompts(prompt: str | None, data: ImageData, labels: list[int] | None) -> str | list[str] | None:
    if prompt is None or "{label}" not in prompt or data.label_names is None or labels is None:
        return prompt
    return [prompt.replace("{label}", data.label_names[label]) for label in labels]


def _stored(work: _Extraction, output: FeatureOutput) -> dict[str, np.ndarray]:
    features = {}
    for column in work.layout.columns:
        feature = output[column.layer][column.level] if work.extractor.many else output[column.layer]
        with np.errstate(over="ignore"):
            values = feature.numpy().astype(work.layout.dtype)
        if not np.isfinite(values).all():
            raise ValueError(
                f"Features of {column.layer!r} reach {float(feature.abs().max()):.4g}, more than {work.layout.dtype} "
                "holds (65504); use dtype float32."
            )
        features[column.name] = values
    return features
