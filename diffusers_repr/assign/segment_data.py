"""`write_segments`: a data set with masks and boxes that nobody drew, as Parquet files to train on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.assign.base import Assigner
from diffusers_repr.assign.segments import (
    Boxes,
    PatchFeatures,
    background_classes,
    find_boxes,
    fit_segments,
    segment_pixels,
)
from diffusers_repr.data.base import hashed, spread_rows
from diffusers_repr.data.image_data import ImageData
from diffusers_repr.data.teacher_features import encoder_fingerprint
from diffusers_repr.hub.files import atomic_folder, read_json, write_json
from diffusers_repr.metrics.gather import failing_together
from diffusers_repr.store.manifest import recipe_differences
from diffusers_repr.store.processes import process_state

SEGMENTS, BOX = "segments", "box"  # columns of masks
RECORD = "segments.json"
_SOME = 256  # images that tell which classes are background


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """What `write_segments` found, besides the files.

    Attributes:
        background: Classes that are background, see `background_classes`.
        pixels: Share of the pixels of each class, in the first split.
        boxes: Share of the images with a box, by split.
    """

    background: list[int]
    pixels: list[float]
    boxes: dict[str, float]


def write_segments(
    out: str | os.PathLike[str],
    splits: Mapping[str, ImageData],
    features: PatchFeatures,
    classes: Assigner,
    box_classes: Assigner | None = None,
    batch_size: int = 64,
    most: int = 100_000,
    seed: int = 0,
) -> Segmentation:
    """Segment the images of a data set by clusters of their patches, and write it anew with two columns of masks.

    `segments` has the class of every pixel. `box`, where there are clusters of boxes, has 255 outside of a box around
    the largest connected region of what is not background, and inside the box's class: the cluster of the region's
    mean feature. Both are PNGs of the size of their image. The clusters are those of the first split; they are kept in
    `segments/` and `boxes/`, and all that decided them in `segments.json`.

    The same call again finds the folder and does nothing. Under `accelerate launch` the main process writes.

    Args:
        out: Folder that is made; it takes its name only when it is whole.
        splits: By name; the images of the first are what is learned from.
        features: Of pixels.
        classes: Not fitted; gives classes, such as k-means.
        box_classes: The same of boxes; None writes no boxes.
        batch_size: Images at a time.
        most: Patches that the clusters are fitted on.
        seed: Of the draw of these and of the fits.

    Raises:
        FileExistsError: If the folder holds segments of another encoder, recipe or data set, or anything else.
        ValueError: For assigners that give no classes, more classes than a mask can hold, more clusters than patches
            or boxes, NaN in features, a data set that has columns of these names.
    """
    folder, recipe = Path(out), _recipe(splits, features, classes, box_classes, most, seed)
    with failing_together():
        if process_state().is_main_process and not _is_written(folder, recipe):
            with atomic_folder(folder, overwrite=False) as place:
                found = _write(place, splits, features, classes, box_classes, batch_size, most, seed)
                write_json(place / RECORD, {"recipe": recipe, "found": dataclasses.asdict(found)})
    return Segmentation(**read_json(folder / RECORD)["found"])


def _recipe(
    splits: Mapping[str, ImageData],
    features: PatchFeatures,
    classes: Assigner,
    box_classes: Assigner | None,
    most: int,
    seed: int,
) -> dict[str, Any]:
    """All that decides what is written, as JSON."""
    assigners = {"segments": classes, "boxes": box_classes}
    recipe = {
        "encoder": encoder_fingerprint(features.encoder),
        "size": features.size,
        "upsample": features.upsample,
        "data": {name: _data_record(data) for name, data in splits.items()},
        "patches": most,
        "seed": seed,
        **{
            name: one and {"assigner": one.kind, **{k: v for k, v in dict(one.config).items() if k[0] != "_"}}
            for name, one in assigners.items()
        },
    }
    return json.loads(json.dumps(recipe))


def _data_record(data: ImageData) -> dict[str, Any]:
    some = data.read(spread_rows(len(data), 16))
    return {"rows": len(data), "images": hashed(np.asarray(image).tobytes() for image in some)}


def _is_written(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds what a recipe gives."""
    if not (folder / RECORD).is_file():
        return False
    differs = recipe_differences(read_json(folder / RECORD)["recipe"], recipe)
    if differs:
        raise FileExistsError(
            f"{str(folder)!r} holds segments of another recipe; nothing was changed. What differs (there -> now): "
            f"{'; '.join(differs)[:400]}. Name another folder."
        )
    return True


def _write(
    folder: Path,
    splits: Mapping[str, ImageData],
    features: PatchFeatures,
    classes: Assigner,
    box_classes: Assigner | None,
    batch_size: int,
    most: int,
    seed: int,
) -> Segmentation:
    first = next(iter(splits))
    generator = torch.Generator().manual_seed(seed)
    fit_segments(features, lambda: _images(splits[first], batch_size), classes, most, generator)
    count = int(classes.null)
    some = splits[first].read(range(min(len(splits[first]), _SOME)))
    background = background_classes(segment_pixels(features.pixels(some), classes), count)
    read = {name: _read(data, features, classes, background, batch_size) for name, data in splits.items()}
    found = {name: segments for name, (segments, _) in read.items()}
    boxes = {name: of_split for name, (_, of_split) in read.items()}
    if box_classes is not None:
        box_classes.fit(boxes[first].features[boxes[first].found], generator)
    for name, data in splits.items():
        _write_split(folder, name, data, found[name], boxes[name], box_classes)
    for name, assigner in ((SEGMENTS, classes), ("boxes", box_classes)):
        if assigner is not None:
            assigner.save_pretrained(folder / name)
    shares = torch.bincount(found[first].flatten(), minlength=count).double() / found[first].numel()
    with_box = {name: float(box.found.double().mean()) for name, box in boxes.items()}
    return Segmentation(background.nonzero().flatten().tolist(), shares.tolist(), with_box)


def _images(data: ImageData, batch_size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(data), batch_size):
        yield data.read(range(start, min(start + batch_size, len(data))))


def _read(
    data: ImageData, features: PatchFeatures, classes: Assigner, background: Tensor, batch_size: int
) -> tuple[Tensor, Boxes]:
    """Segments `(N, H, W)`, one byte a pixel, and boxes; each image is encoded once."""
    segments, boxes = [], []
    for images in _images(data, batch_size):
        pixels = features.pixels(images)
        segments.append(segment_pixels(pixels, classes).to(torch.uint8))
        boxes.append(find_boxes(segments[-1], background, pixels))
    names = ("corners", "features", "found")
    return torch.cat(segments), Boxes(*(torch.cat([getattr(part, name) for part in boxes]) for name in names))


def _write_split(
    folder: Path, name: str, data: ImageData, segments: Tensor, boxes: Boxes, classes: Assigner | None
) -> None:
    columns = {SEGMENTS: segments}
    if classes is not None:
        ids = torch.full((len(segments),), -1)
        if bool(boxes.found.any()):
            ids[boxes.found] = classes.assign(boxes.features[boxes.found]).cpu()
        columns[BOX] = boxes.masks(ids, (segments.shape[1], segments.shape[2])).to(torch.uint8)
    taken = [column for column in columns if column in data.dataset.features]
    if taken:
        raise ValueError(f"The data set has a column {taken[0]!r} already; drop it, or train on that one.")

    def rows() -> Iterator[dict[str, Any]]:
        for at in range(len(data)):
            row = data.dataset.with_format(None)[at]
            width, height = row[data.image_column].size
            masks = {column: _mask(values[at], (width, height)) for column, values in columns.items()}
            yield {**row, **masks}

    kinds = datasets.Features({**data.dataset.features, **{column: datasets.Image() for column in columns}})
    (folder / "data").mkdir(exist_ok=True)
    # The form in which `datasets` finds splits of any name.
    written = datasets.Dataset.from_list(list(rows()), features=kinds, split=datasets.NamedSplit(name))
    written.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


def _mask(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask of bytes as an image of (width, height)."""
    return Image.fromarray(values.numpy()).resize(size, Image.Resampling.NEAREST)


__all__ = ["BOX", "RECORD", "SEGMENTS", "Segmentation", "write_segments"]
