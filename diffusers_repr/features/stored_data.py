"""`StoredFeatures`: training data whose samples are features from stores instead of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.base import TrainData
from diffusers_repr.store.feature_store import FeatureStore


class StoredFeatures(TrainData):
    """Features of a data set, of one or several draws of noise, held in memory in the stores' dtype.

    A sample has `layer_features`, layer path -> `(levels, ...)`, `class_labels` and `index`, the row. Samples are the
    rows of the first draw, then those of the second: a run that passes over them sees every draw of every image.

    Args:
        stores: One a draw, of the same data set, layers and levels.

    Attributes:
        rows: Images.
        name: Of the data set.

    Raises:
        ValueError: Without labels, and for stores that are not of the same images.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        first = stores[0]
        self.stores, self.rows, self.name = list(stores), len(first), str(first.recipe["data"]["name"])
        self._labels = torch.from_numpy(first.labels().astype(np.int64))
        for store in self.stores[1:]:
            if not np.array_equal(store.labels(), first.labels()) or store.layout.columns != first.layout.columns:
                raise ValueError(f"{store.folder} is not of the images, layers and levels of {first.folder}.")
        places: dict[str, list[tuple[int, float]]] = {}
        for column in first.columns:
            places.setdefault(column.layer, []).append((column.level, column.timestep))
        self._maps = {
            layer: [torch.stack([torch.from_numpy(store.array(layer, time)) for _, time in sorted(levels)], dim=1)
                    for store in self.stores]
            for layer, levels in places.items()
        }  # fmt: skip

    def __len__(self) -> int:
        return self.rows * len(self.stores)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: _first(value) for key, value in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What joining `self[i]` for each of `indices` gives."""
        at = torch.as_tensor(indices)
        draws, rows = at // self.rows, at % self.rows
        features: dict[str, Tensor] = {}
        for layer, maps in self._maps.items():
            found = maps[0][rows]
            for draw in draws.unique().tolist():
                found[draws == draw] = maps[draw][rows[draws == draw]]
            features[layer] = found
        return {"layer_features": features, "class_labels": self._labels[rows], "index": rows}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `TrainData`; features become float32."""
        return {**batch, "layer_features": {k: v.float() for k, v in batch["layer_features"].items()}}

    def fingerprint(self) -> dict[str, Any]:
        """See `TrainData`: the recipes of the stores."""
        return {"rows": self.rows, "stores": [store.layout.recipe for store in self.stores]}

    @property
    def labels(self) -> np.ndarray:
        """Class id of every image."""
        return self._labels.numpy()

    @property
    def class_names(self) -> list[str] | None:
        """See `TrainData`."""
        names = self.stores[0].label_names
        return names or [str(number) for number in range(int(self._labels.max()) + 1)]


def _first(value: Any) -> Any:
    return {k: v[0] for k, v in value.items()} if isinstance(value, dict) else value[0]


__all__ = ["StoredFeatures"]
