"""What clusters have to do with labels: purity and normalised mutual information."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def purity(clusters: Any, labels: Any) -> float:
    """Share of the images whose label is the commonest one of their cluster; from 1 / N-th up to 1.

    It grows with the number of clusters, and is 1 where each image has its own.

    Args:
        clusters: Ids `(N,)`, whole numbers from 0.
        labels: Class ids `(N,)`, whole numbers from 0.

    Raises:
        ValueError: For other shapes, what are no whole numbers, and ids below 0.

    Example:
        >>> purity([0, 0, 0, 1, 1], [2, 2, 0, 1, 1])
        0.8
    """
    pair, known = _ids(clusters, labels)
    counts = torch.zeros(int(pair.max()) + 1, int(known.max()) + 1, dtype=torch.long)
    counts.index_put_((pair, known), torch.ones_like(pair), accumulate=True)
    return float(counts.amax(1).sum()) / len(pair)


def normalized_mutual_information(clusters: Any, labels: Any) -> float:
    """Mutual information of clusters and labels over the mean of their entropies, from 0 to 1; scikit-learn's.

    Args:
        clusters: As in `purity`.
        labels: Likewise.

    Raises:
        ValueError: As `purity`.
    """
    from sklearn.metrics import normalized_mutual_info_score

    pair, known = _ids(clusters, labels)
    return float(normalized_mutual_info_score(known.numpy(), pair.numpy()))


def _ids(clusters: Any, labels: Any) -> tuple[Tensor, Tensor]:
    found = [torch.as_tensor(values) for values in (clusters, labels)]
    if any(values.ndim != 1 or not len(values) for values in found) or len(found[0]) != len(found[1]):
        raise ValueError(f"Clusters and labels are (N,) each; got {tuple(found[0].shape)}, {tuple(found[1].shape)}.")
    if any(values.is_floating_point() or int(values.min()) < 0 for values in found):
        raise ValueError("Clusters and labels are whole numbers from 0; leave out images without a label (-1).")
    return found[0].long(), found[1].long()


__all__ = ["normalized_mutual_information", "purity"]
