"""What images are conditioned on, as `diffusers-repr assign` wrote it: classes, vectors, or vectors of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.label_column import ClassLabels
from diffusers_repr.store.assignment_store import AssignmentStore
from diffusers_repr.store.manifest import MANIFEST, recipe_differences
from diffusers_repr.store.vector_store import VectorTable, index_fingerprint

# Folders inside that of `diffusers-repr assign`.
ASSIGNMENTS, ASSIGNER, VECTORS, INDEX = "assignments", "assigner", "vectors", "index"


class AssignedConditions:
    """Conditions by row of the data set.

    Args:
        store: Of the assignments.
        labels: Class ids of all rows, where classes were assigned.
        vectors: `(N, D)`, where vectors were.
        neighbours: `(N, k)` rows of `index`, where neighbours were.
        index: Vectors of the neighbours.
        own: Vectors of the images, one of which stands before its neighbours; None for neighbours alone.
    """

    def __init__(
        self,
        store: AssignmentStore,
        labels: ClassLabels | None = None,
        vectors: Tensor | None = None,
        neighbours: Tensor | None = None,
        index: VectorTable | None = None,
        own: VectorTable | None = None,
    ) -> None:
        self.store, self.labels = store, labels
        self._vectors, self._neighbours, self._index, self._own = vectors, neighbours, index, own

    @property
    def has_values(self) -> bool:
        """Whether rows have vectors or tokens, and not classes alone."""
        return self._vectors is not None or self._neighbours is not None

    def values(self, rows: Tensor) -> Tensor:
        """Vectors `(*rows.shape, D)` or tokens `(*rows.shape, k, D)`, float32."""
        if self._vectors is not None:
            return self._vectors[rows]
        assert self._neighbours is not None
        assert self._index is not None
        tokens = self._index[self._neighbours[rows]]
        return tokens if self._own is None else torch.cat([self._own[rows].unsqueeze(-2), tokens], -2)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the conditions, as JSON."""
        tokens = None if self._neighbours is None else self._neighbours.shape[1]
        return {"recipe": self.store.layout.recipe, "neighbours": tokens, "include_query": self._own is not None}


def open_assigned(config: DataConfig, rows: int, images: str) -> AssignedConditions:
    """The conditions that a configuration names, checked against the images of the run.

    Args:
        config: With `assignments_dir`: a folder of `diffusers-repr assign`, or a store of `write_assignments`.
        rows: Of the data set.
        images: Hash of its images, as the record of the assignments has it.

    Raises:
        FileNotFoundError: If there are none, or neighbours without their index.
        ValueError: For assignments of other images, neighbours of another index, and settings that do not fit.
    """
    folder = Path(str(config.assignments_dir))
    store = AssignmentStore.open(folder if (folder / MANIFEST).is_file() else folder / ASSIGNMENTS)
    _check_images(store, rows, images)
    columns = store.layout.columns
    of_neighbours = [name for name in ("index_dir", "num_neighbours", "include_query") if getattr(config, name)]
    if "neighbours" not in columns and of_neighbours:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(columns)} and no neighbours, so {', '.join(of_neighbours)} would not "
            "act; leave it out."
        )
    if "neighbours" in columns:
        return AssignedConditions(store, _labels(store, config), None, *_neighbours(store, config, folder, rows))
    vectors = torch.from_numpy(store.array("vector")) if "vector" in columns else None
    return AssignedConditions(store, _labels(store, config), vectors)


def _check_images(store: AssignmentStore, rows: int, images: str) -> None:
    told = store.recipe["data"]
    if len(store) != rows:
        raise ValueError(
            f"{str(store.folder)!r} assigns {len(store)} rows, and the run has {rows} images: it is of other data. "
            "Run `diffusers-repr assign` on the data of the run, or choose its --dataset_name and --dataset_split."
        )
    if told.get("images", images) != images:
        raise ValueError(
            f"{str(store.folder)!r} was assigned to other images than those of the run (of the same number). Run "
            "`diffusers-repr assign` on the data of the run, or choose its --dataset_name and --dataset_split."
        )


def _labels(store: AssignmentStore, config: DataConfig) -> ClassLabels | None:
    if "class_id" not in store.layout.columns:
        return None
    if config.label_column not in (None, "none"):
        raise ValueError(
            f"Class ids come from label_column={config.label_column!r} or from assignments_dir, which holds some too; "
            "leave one out."
        )
    ids = store.array("class_id")
    gone = np.flatnonzero(ids < 0)
    if len(gone) and config.missing_labels == "error":
        raise ValueError(
            f"{len(gone)} of {len(ids)} images have no class in {str(store.folder)!r}, the first is row {gone[0]}; "
            "pass --missing_labels keep for an objective that learns from them too."
        )
    count = store.layout.num_classes or int(ids.max(initial=-1)) + 1
    return ClassLabels(ids, [str(cluster) for cluster in range(count)])


def _neighbours(
    store: AssignmentStore, config: DataConfig, folder: Path, rows: int
) -> tuple[Tensor, VectorTable, VectorTable | None]:
    """The neighbours that are used, the vectors of the index, and those of the images where they are wanted."""
    place = Path(config.index_dir) if config.index_dir else folder / INDEX
    table = VectorTable.open(place)
    _check_index(store, index_fingerprint(place), str(place))
    found = torch.from_numpy(store.array("neighbours"))
    wanted = config.num_neighbours or found.shape[1]
    if wanted > found.shape[1]:
        raise ValueError(
            f"num_neighbours={wanted}, and {str(store.folder)!r} holds {found.shape[1]} an image; run `diffusers-repr "
            f"assign --k {wanted}`, or take fewer."
        )
    if len(found) and int(found.max()) >= len(table):
        raise ValueError(
            f"{str(store.folder)!r} names row {int(found.max())} of an index, and {str(place)!r} has {len(table)}."
        )
    own = None
    if config.include_query:
        own = VectorTable.open(folder / VECTORS) if (folder / VECTORS).is_dir() else table
        if len(own) < rows or own.dim != table.dim:
            raise ValueError(
                f"include_query needs a vector of each of {rows} images, of {table.dim} values as the index has; "
                f"{str(folder)!r} holds {len(own)} of {own.dim}."
            )
    return found[:, :wanted].contiguous(), table, own


def _check_index(store: AssignmentStore, found: Mapping[str, Any], place: str) -> None:
    """Neighbours are rows of the index they were found in; one that has grown since has these rows still."""
    told = store.assigner.get("index")
    if told is None:
        return
    parts = len(told["parts"])
    now = {**found, "rows": found["rows"][:parts], "parts": found["parts"][:parts]}
    differs = recipe_differences(told, now)
    if differs:
        raise ValueError(
            f"The neighbours in {str(store.folder)!r} are of another index than {place!r} (there -> here): "
            f"{'; '.join(differs)}. Name theirs by --index_dir, or assign anew."
        )


__all__ = ["ASSIGNER", "ASSIGNMENTS", "INDEX", "VECTORS", "AssignedConditions", "open_assigned"]
