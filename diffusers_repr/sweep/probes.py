"""Probes: how well do frozen features tell classes apart? Each score carries the protocol it was measured under."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.heads.base import Head
from diffusers_repr.heads.fitting.fit import accuracy_of, check_training_set, fit_head
from diffusers_repr.heads.fitting.protocols import PROTOCOLS, KNNProtocol, Protocol
from diffusers_repr.hub.checks import check_whole


@dataclass(frozen=True)
class ProbeScore:
    """What a probe measured.

    Attributes:
        accuracy: Share of test rows that are told right, 0 to 1.
        protocol: Every field of the protocol, its version and what was chosen under it.
        rows: Training rows.
        test_rows: Test rows.
        head: The fitted head.
    """

    accuracy: float
    protocol: Mapping[str, Any]
    rows: int
    test_rows: int
    head: Head

    def __float__(self) -> float:
        return self.accuracy


@dataclass(frozen=True)
class FewShotScore:
    """Accuracies of probes on a few labels a class.

    Attributes:
        shots: Labels a class.
        mean: Mean accuracy over the draws.
        std: Its standard deviation (n - 1); 0 with one draw.
        accuracies: Of each draw.
        protocol: As in `ProbeScore`, of the first draw.
    """

    shots: int
    mean: float
    std: float
    accuracies: tuple[float, ...]
    protocol: Mapping[str, Any]

    def __float__(self) -> float:
        return self.mean


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    protocol: str | Protocol | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> ProbeScore:
    """Accuracy of a linear classifier on frozen, pooled features.

    Args:
        features: `(N, D)`; REPA and DDAE take the mean over tokens or positions, with the null condition.
        labels: `(N,)` class ids from 0.
        test_features: `(M, D)`, from the same layer and level.
        test_labels: `(M,)`.
        protocol: `lbfgs` (None: to the optimum, the same on every machine), `ridge`, or one of the literature: `repa`,
            `mae`, `ddae`; or a `Protocol`. Scores compare only under one protocol; `PROTOCOLS[name].source` says
            what of it is known from where.
        validation: Features and labels on which a penalty is tuned; never the test's. Without it, `lbfgs` and
            `ridge` hold a fifth of the training rows out for that.
        seed: Of every draw.

    Raises:
        ValueError: For features and labels that do not fit, NaN, one class only, or test labels that training lacks.

    Example:
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> linear_probe(x[:40], y[:40], x[40:], y[40:]).accuracy > 0.8
        True
    """
    return _probe("linear", features, labels, test_features, test_labels, protocol, seed, validation)


def knn_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    metric: str = "cosine",
    temperature: float | None = 0.07,
    standardize: bool = True,
) -> ProbeScore:
    """Accuracy of the vote of the k nearest training features (Wu et al. 2018, arXiv 1805.01978); nothing is learned.

    Args:
        features: `(N, D)`, the bank.
        labels: `(N,)` class ids from 0.
        test_features: `(M, D)`.
        test_labels: `(M,)`.
        k: Neighbours that vote, at most N.
        metric: `cosine` or `euclidean`.
        temperature: Votes are weighted by `exp(similarity / temperature)`; None: all alike.
        standardize: By mean and std of the bank, before the distance. The source does not.

    Raises:
        ValueError: As `linear_probe`, and for k outside 1 to N.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> knn_probe(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]), k=1).accuracy
        1.0
    """
    check_whole("k", k, 1, len(features))
    base = PROTOCOLS["knn"]
    assert isinstance(base, KNNProtocol)
    protocol = base.replace(k=k, metric=metric, temperature=temperature, standardize=standardize)
    return _probe("knn", features, labels, test_features, test_labels, protocol, 0, None)


def few_shot_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    shots: int,
    *,
    draws: int = 5,
    protocol: str | Protocol | None = None,
    seed: int = 0,
) -> FewShotScore:
    """Accuracy of linear probes that see `shots` labels of each class, over several draws of which.

    Draw n depends on the seed and n alone, and fewer shots are a part of more: draws with 1 and 5 shots are nested.

    Args:
        features: `(N, D)`, to draw from.
        labels: `(N,)`.
        test_features: `(M, D)`.
        test_labels: `(M,)`.
        shots: Labels a class.
        draws: How often.
        protocol: As in `linear_probe`.
        seed: Of the draws.

    Raises:
        ValueError: As `linear_probe`, and if a class has fewer rows than `shots`.
    """
    check_whole("shots", shots, 1)
    check_whole("draws", draws, 1)
    labels = torch.as_tensor(labels)
    _check(features, labels, test_features, torch.as_tensor(test_labels))
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < shots:
        few = classes[counts < shots].tolist()
        raise ValueError(f"Classes {few[:10]} have fewer than shots={shots} rows.")
    scores = []
    for draw in range(draws):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + draw)).to(labels.device)
        rows = torch.cat([order[labels[order] == c][:shots] for c in classes])
        part = (features[rows.to(features.device)], labels[rows])
        scores.append(linear_probe(*part, test_features, test_labels, protocol=protocol, seed=seed + draw))
    accuracies = tuple(score.accuracy for score in scores)
    std = statistics.stdev(accuracies) if draws > 1 else 0.0
    return FewShotScore(shots, statistics.fmean(accuracies), std, accuracies, scores[0].protocol)


def _probe(
    head: str,
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    protocol: str | Protocol | None,
    seed: int,
    validation: tuple[Tensor, Tensor] | None,
) -> ProbeScore:
    labels, test_labels = torch.as_tensor(labels), torch.as_tensor(test_labels)
    classes = _check(features, labels, test_features, test_labels)
    generator = torch.Generator().manual_seed(seed)
    fitted = fit_head(
        features, labels, classes, head=head, protocol=protocol, validation=validation, generator=generator
    )
    with torch.no_grad():
        accuracy = accuracy_of(fitted.head, test_features, test_labels)
    return ProbeScore(accuracy, fitted.protocol, len(features), len(test_features), fitted.head)


def _check(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> int:
    """Number of classes of what was checked."""
    classes = int(labels.max()) + 1 if labels.numel() and not labels.is_floating_point() else 0
    check_training_set(features, labels, classes, "training")
    check_training_set(test_features, test_labels, classes, "test", features.shape[1])
    unseen = sorted(set(test_labels.unique().tolist()) - set(labels.unique().tolist()))
    if unseen:
        raise ValueError(f"Classes {unseen[:10]} of the test set have no training row; use the same label ids.")
    return classes
