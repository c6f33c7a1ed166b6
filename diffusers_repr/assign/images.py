"""Images to conditions, once for a whole data set: vectors of an encoder, an assigner, and what it gives every row."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.assign.base import Assigner, assigner_class
from diffusers_repr.assign.index import Kind, RetrievalIndex
from diffusers_repr.data.assigned import ASSIGNER, ASSIGNMENTS, INDEX, VECTORS
from diffusers_repr.data.latents import image_fingerprint
from diffusers_repr.data.teacher_features import encoder_fingerprint
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.hub.files import atomic_folder, read_json, write_json
from diffusers_repr.metrics.gather import failing_together
from diffusers_repr.store.assignment_store import AssignmentStore, write_assignments
from diffusers_repr.store.manifest import recipe_differences
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.vector_store import INDEX_RECORD, VectorStore, VectorTable, part_name, write_vectors

_FIT = "fit.json"


class VectorEncoder(Protocol):
    """What gives a vector an image: an `Encoder`, or an `ImageTextEncoder` for the space that it shares with texts."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides the vectors, as JSON."""

    def to(self, device: Any = None) -> Any:
        """Move the network."""


@dataclasses.dataclass(frozen=True)
class AssignSettings:
    """How a data set is worked through; nothing here changes what is assigned but `dtype`.

    Attributes:
        batch_size: Images of one forward.
        shard_size: Rows of a file of vectors; at most 256 MiB if None.
        dtype: Of the stored vectors: `float32` or `float16`.
        num_threads: That decode images; 0: none beside the work.
        device: Where the encoder works; that of the process if None.
        progress: Show bars on the main process.
    """

    batch_size: int = 64
    shard_size: int | None = None
    dtype: str = "float32"
    num_threads: int = 0
    device: str | None = None
    progress: bool = True


def encode_images(
    encoder: VectorEncoder, data: ImageTrainData, out: str | os.PathLike[str], settings: AssignSettings | None = None
) -> VectorStore:
    """Write the vector of every image, as it is cropped and before any augmentation; the same call goes on.

    Under `accelerate launch` the processes share the work.

    Args:
        encoder: See `VectorEncoder`; it is moved to the process's device.
        data: The images.
        out: Folder of the vectors.
        settings: See `AssignSettings`.

    Raises:
        FileExistsError: If the folder holds vectors of another encoder, crop or data set.
        ValueError: For images that cannot be read, and vectors that are not finite.
    """
    settings = settings or AssignSettings()
    device = torch.device(settings.device or process_state().device)
    encoder.to(device)
    dim = vectors_of(encoder, to_unit(data.images[0][None].to(device))).shape[1]
    with ThreadPoolExecutor(max(1, settings.num_threads)) as threads:
        read = threads.map if settings.num_threads else map

        def vectors(start: int, stop: int) -> Tensor:
            pixels = torch.stack(list(read(data.images.__getitem__, range(start, stop))))
            return vectors_of(encoder, to_unit(pixels.to(device)))

        return write_vectors(
            out,
            len(data),
            dim,
            vectors,
            {"encoder": encoder_fingerprint(encoder), "data": image_fingerprint(data)},
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            shard_size=settings.shard_size,
            progress=settings.progress,
        )


def vectors_of(encoder: Any, pixels: Tensor) -> Tensor:
    """`(B, D)` float32 of pixels `(B, C, H, W)` in [-1, 1]: global features, or those that images share with texts."""
    if hasattr(encoder, "embed_images"):
        return encoder.embed_images(pixels)
    return encoder.encode_pixels(pixels).global_features


def assign_images(
    encoder: VectorEncoder,
    data: ImageTrainData,
    assigner: Assigner,
    out: str | os.PathLike[str],
    *,
    labels: Any = None,
    seed: int = 0,
    split: str = "train",
    settings: AssignSettings | None = None,
) -> AssignmentStore:
    """Fit an assigner on a data set and keep what it gives every image; the same call goes on after a kill.

    Under `accelerate launch` the processes share all but the fit.

    Args:
        encoder: See `encode_images`.
        data: The images.
        assigner: Not fitted; one that gives classes or vectors (neighbours: `assign_neighbours`).
        out: Folder: `vectors/`, `assigner/` (which loads by its class) and `assignments/`, a store for training's
            `assignments_dir`.
        labels: For a classifier: class ids of all images, -1 for those without.
        seed: Of the fit.
        split: Of the data set, for the record.
        settings: See `AssignSettings`.

    Raises:
        FileExistsError: If the folder holds assignments of another encoder, assigner, seed or data set; nothing is
            changed.
        ValueError: As `encode_images` and `Assigner.fit`.
    """
    if assigner.gives == "neighbours":
        raise ValueError("Neighbours are rows of an index: take assign_neighbours.")
    settings, folder = settings or AssignSettings(), Path(out)
    _refuse_other(folder / ASSIGNER, assigner, seed, labels)
    vectors = encode_images(encoder, data, folder / VECTORS, settings)
    fitted = _fitted(folder / ASSIGNER, assigner, vectors, seed, labels)
    table = VectorTable.open(folder / VECTORS)
    column = {"class": "class_id", "vector": "vector"}[fitted.gives]

    def assign(start: int, stop: int) -> dict[str, np.ndarray]:
        return {column: fitted.assign(table[torch.arange(start, stop)]).numpy()}

    classes = int(fitted.null) if fitted.gives == "class" else None
    return write_assignments(
        folder / ASSIGNMENTS,
        len(data),
        assign,
        assigner={**fitted.fingerprint(), "encoder": encoder_fingerprint(encoder)},
        data=_told(data),
        num_classes=classes,
        split=split,
        progress=settings.progress,
    )


def assign_neighbours(
    encoder: VectorEncoder,
    data: ImageTrainData,
    out: str | os.PathLike[str],
    k: int,
    *,
    index: RetrievalIndex | None = None,
    exclude_self: bool = True,
    kind: Kind = "exact",
    cells: int | None = None,
    probes: int | None = None,
    split: str = "train",
    settings: AssignSettings | None = None,
) -> AssignmentStore:
    """Keep the k nearest neighbours of every image; the same call goes on after a kill.

    Args:
        encoder: See `encode_images`.
        data: The images.
        out: Folder: `assignments/`, and `index/` of the images' own vectors, or `vectors/` beside another index.
        k: Neighbours; 20 are stored for RDM, of which training uses 4.
        index: Other vectors of the same encoder, such as of a larger set; the images themselves if None.
        exclude_self: Of the images themselves: an image is none of its own neighbours.
        kind: Of the index that is made, as its `cells` and `probes`.
        cells: See `RetrievalIndex.build`.
        probes: Likewise.
        split: Of the data set, for the record.
        settings: See `AssignSettings`.

    Raises:
        FileExistsError: If the folder holds neighbours of another encoder, index, k or data set.
        ValueError: As `encode_images`; for k beyond the index, and an index of another encoder or dimension.
    """
    settings, folder, own = settings or AssignSettings(), Path(out), index is None
    fingerprint = encoder_fingerprint(encoder)
    room = (len(data) if index is None else len(index)) - (own and exclude_self)
    if not 1 <= k <= room:
        raise ValueError(f"k={k} neighbours among {room} images; k runs from 1 to as many.")
    if index is not None:
        index.check_encoder(fingerprint)
    vectors = encode_images(encoder, data, folder / (INDEX + "/" + part_name(0) if own else VECTORS), settings)
    if index is None:
        index = _made_index(folder / INDEX, kind, cells, probes, fingerprint)
    if vectors.dim != index.dim:
        raise ValueError(f"The images have vectors of {vectors.dim} values, the index of {index.dim}.")
    table, excluding = VectorTable(vectors.blocks()), own and exclude_self
    searched = index

    def assign(start: int, stop: int) -> dict[str, np.ndarray]:
        rows = torch.arange(start, stop)
        found, scores = searched.search(table[rows], k, rows if excluding else None)
        return {"neighbours": found.numpy(), "distances": (1 - scores).numpy()}

    record = {"assigner": "neighbours", "k": k, "exclude_self": excluding, "kind": index.kind, "probes": index.probes}
    store = write_assignments(
        folder / ASSIGNMENTS,
        len(data),
        assign,
        assigner={**record, "index": index.fingerprint(), "encoder": fingerprint},
        data=_told(data),
        index_rows=len(index),
        split=split,
        batch_size=256,
        progress=settings.progress,
    )
    if own:
        with failing_together():
            if process_state().is_main_process:
                index.count_retrieved(store.array("neighbours"))
    return store


def _told(data: ImageTrainData) -> dict[str, Any]:
    return {"name": Path(data.name).name if data.name else None, **image_fingerprint(data)}


def _made_index(
    folder: Path, kind: Kind, cells: int | None, probes: int | None, encoder: Mapping[str, Any]
) -> RetrievalIndex:
    with failing_together():
        if process_state().is_main_process and not (folder / INDEX_RECORD).is_file():
            RetrievalIndex.from_vectors(folder, kind, cells=cells, probes=probes, encoder=encoder)
    found = RetrievalIndex.open(folder)
    told = {"kind": kind, "cells": cells or found.cells, "probes": probes or found.probes}
    differs = recipe_differences({"kind": found.kind, "cells": found.cells, "probes": found.probes}, told)
    if differs:
        raise FileExistsError(f"{str(folder)!r} holds another index (there -> now): {'; '.join(differs)}.")
    return found


def _fit_record(assigner: Assigner, seed: int, labels: Any) -> dict[str, Any]:
    """What decides a fit beside the vectors."""
    config = {key: value for key, value in dict(assigner.config).items() if not key.startswith("_")}
    known = None if labels is None else np.asarray(labels).tolist()
    return {"assigner": assigner.kind, "config": config, "seed": seed, "labels": known}


def _refuse_other(folder: Path, assigner: Assigner, seed: int, labels: Any) -> None:
    """Before hours of encoding: whether the folder holds an assigner of another recipe."""
    if (folder / _FIT).is_file():
        there = {key: value for key, value in read_json(folder / _FIT).items() if key != "vectors"}
        differs = recipe_differences(there, _fit_record(assigner, seed, labels))
        if differs:
            raise FileExistsError(
                f"{str(folder)!r} holds an assigner of another recipe; nothing was changed. What differs (there -> "
                f"now): {'; '.join(differs)[:400]}. Run the old command to finish it, or name another folder."
            )


def _fitted(folder: Path, assigner: Assigner, vectors: VectorStore, seed: int, labels: Any) -> Assigner:
    """The assigner of a folder; fitted by the main process where there is none."""
    record = {**_fit_record(assigner, seed, labels), "vectors": vectors.content}
    with failing_together():
        if process_state().is_main_process and not (folder / _FIT).is_file():
            features = VectorTable(vectors.blocks())[_sampled(assigner, len(vectors), seed)]
            options = {} if labels is None else {"labels": torch.as_tensor(labels)}
            assigner.fit(features, torch.Generator().manual_seed(seed), **options)
            with atomic_folder(folder) as place:
                assigner.save_pretrained(place)
                write_json(place / _FIT, record)
    differs = recipe_differences(read_json(folder / _FIT), record)
    if differs:
        raise FileExistsError(f"{str(folder)!r} is of other vectors (there -> now): {'; '.join(differs)}.")
    return assigner_class(str(assigner.kind)).from_pretrained(folder)


def _sampled(assigner: Assigner, rows: int, seed: int) -> Tensor:
    """Rows that are read for the fit: all, or for an assigner that takes a sample no more than that."""
    most = assigner.most_rows
    if most is None or rows <= most:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values


__all__ = ["AssignSettings", "VectorEncoder", "assign_images", "assign_neighbours", "encode_images", "vectors_of"]
