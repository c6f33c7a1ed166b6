"""`VectorData`: training data that are vectors in memory, such as the features of a data set's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.base import TrainData, hashed


class VectorData(TrainData):
    """Vectors `(N, D)`, with or without a class each; a batch has them in `condition`.

    Args:
        vectors: Floats, `(N, D)`.
        labels: Class ids, `(N,)`; -1 is none.
        class_names: Name of each class id; needed with labels.
        name: Of the data set.
        record: What made the vectors, as JSON.

    Raises:
        ValueError: For other shapes, values that are not finite, and labels that have no name.

    Example:
        >>> VectorData(torch.zeros(3, 2))[1]["condition"]
        tensor([0., 0.])
    """

    def __init__(
        self,
        vectors: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        *,
        name: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if vectors.ndim != 2 or not len(vectors) or not vectors.is_floating_point():
            raise ValueError(f"vectors are floats (N, D) with N of 1 or more; got {tuple(vectors.shape)}.")
        if not bool(vectors.isfinite().all()):
            raise ValueError("The vectors have NaN or infinite values.")
        if (labels is None) != (class_names is None) or (labels is not None and labels.shape != (len(vectors),)):
            raise ValueError(f"labels are ({len(vectors)},), and come with class_names.")
        if (
            labels is not None
            and class_names is not None
            and not -1 <= int(labels.min()) <= int(labels.max()) < len(class_names)
        ):
            raise ValueError(
                f"labels lie in 0..{len(class_names) - 1}; got {int(labels.min())} to {int(labels.max())}."
            )
        self.vectors = vectors.detach().float().cpu().contiguous()
        self.labels = None if labels is None else labels.long().cpu()
        self._names = None if class_names is None else list(class_names)
        self.name, self.record = name, dict(record or {})

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[0] for key, value in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Rows as a batch."""
        rows = torch.as_tensor(list(indices))
        labels = {} if self.labels is None else {"class_labels": self.labels[rows]}
        return {"condition": self.vectors[rows], "index": rows, **labels}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As it is."""
        return dict(batch)

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the vectors and labels, and what made them."""
        parts = [self.vectors.numpy().tobytes()]
        parts += [] if self.labels is None else [self.labels.numpy().astype(np.int64).tobytes()]
        return {"vectors": hashed(parts), "rows": len(self), "width": self.vectors.shape[1], "made_by": self.record}

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class id; None without labels."""
        return self._names


__all__ = ["VectorData"]
