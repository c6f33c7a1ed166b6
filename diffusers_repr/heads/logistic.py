"""Multinomial logistic regression by L-BFGS in float64: the same optimum on every machine, from zero weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST = 2048  # features of which the covariance is diagonalised


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    max_iter: int = 1000,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Minimise `mean cross-entropy + l2 / 2 ||W||^2`; the bias has no penalty.

    scikit-learn's `LogisticRegression(C=1 / (N * l2))` has the same optimum (the biases to a common constant).

    Args:
        features: `(N, D)`, float64 to save a copy. Standardise them first: the penalty depends on their units.
        labels: `(N,)` class ids.
        num_classes: K.
        l2: Penalty.
        max_iter: Most iterations.
        tolerance: Largest absolute gradient at which it stops.

    Returns:
        Weight `(K, D)` and bias `(K,)`, float64.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    return fit_logistic_path(features, labels, num_classes, [l2], max_iter, tolerance)[0]


def fit_logistic_path(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    max_iter: int = 1000,
    tolerance: float = 1e-6,
) -> list[tuple[Tensor, Tensor]]:
    """As `fit_logistic`, for several penalties; each starts from the optimum of the one before.

    The variables are those in which the problem's curvature is about 1 in every direction: `W = U S V'` with the
    features' covariance `V diag(lambda) V'` and `S = 1 / sqrt(lambda / K + l2)`. That changes the number of
    iterations, not the optimum.
    """
    x, device = features.double(), features.device
    labels = labels.to(device).long()
    target = torch.nn.functional.one_hot(labels, num_classes).double()
    values, vectors = _axes(x)
    x = x if vectors is None else x @ vectors
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device)
    found = []
    for l2 in penalties:
        scale = (values / num_classes + l2).clamp(min=1e-12).rsqrt()
        u, bias = _minimise(x * scale, labels, target, weight / scale, bias, l2 * scale**2, max_iter, tolerance)
        weight = u * scale
        found.append((weight if vectors is None else weight @ vectors.T, bias))
    return found


def _axes(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Variances of features and the axes they belong to (None: the features' own)."""
    if x.shape[1] > _LARGEST:
        return x.var(0, correction=0), None
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    return values.clamp(min=0), vectors


def _minimise(
    x: Tensor,
    labels: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor,
    penalty: Tensor,
    max_iter: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias with the lowest `mean cross-entropy + sum(penalty * weight^2) / 2`; `penalty` is `(D,)`."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> float:
        logits = torch.addmm(bias, x, weight.T)
        loss = torch.nn.functional.cross_entropy(logits, labels) + (penalty * weight.square()).sum() / 2
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("The logistic regression's loss is not finite; check the features for NaN.")
        # d loss / d logits = (softmax - onehot) / N
        error = (logits.softmax(1) - target) / len(x)
        weight.grad, bias.grad = error.T @ x + penalty * weight, error.sum(0)
        return float(loss)

    optimizer.step(closure)
    return weight.detach(), bias.detach()
