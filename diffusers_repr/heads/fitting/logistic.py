"""Multinomial logistic regression to its optimum, by scikit-learn, with what shows that it was reached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NEAR = 1e-2  # largest distance to the optimum's weights that counts as converged
_NEVER = -1e4  # bias of a class without rows: its optimum is minus infinity


@dataclass(frozen=True)
class LogisticFit:
    """A fit, and how near the optimum it is.

    Attributes:
        weight: `(K, D)`, float64.
        bias: `(K,)`, float64.
        gradient_norm: Of the objective there, over all weights and biases. The objective is at least `l2`-convex, so
            the weights are within `gradient_norm / l2` of the optimum's.
        converged: Whether that distance is at most 0.01.
        iterations: Of the solver.
    """

    weight: Tensor
    bias: Tensor
    gradient_norm: float
    converged: bool
    iterations: int


def fit_logistic_path(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    max_iter: int = 10_000,
    tolerance: float = 1e-10,
    intercept: bool = True,
) -> list[LogisticFit]:
    """Minimise `mean cross-entropy + l2 / 2 ||W||^2` for each penalty; the bias has none.

    This is scikit-learn's `LogisticRegression(C=1 / (N l2))`, each penalty started from the weights of the one before.
    It runs on the CPU in float64.

    Args:
        features: `(N, D)`, of any device. Standardise them first: the penalty depends on their units.
        labels: `(N,)` class ids of at least two classes.
        num_classes: K; a class without rows gets no weight and a bias of -1e4.
        penalties: Values of l2, above 0; strong to weak is fastest.
        max_iter: Most iterations a penalty.
        tolerance: Largest absolute gradient at which the solver stops.
        intercept: False: no bias, which is 0 then.

    Raises:
        ValueError: For features that are not finite.

    Example:
        >>> x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]])
        >>> fit = fit_logistic_path(x, torch.tensor([0, 0, 1, 1]), 2, [0.1])[0]
        >>> fit.converged, (x @ fit.weight.float().T + fit.bias.float()).argmax(1).tolist()
        (True, [0, 0, 1, 1])
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = features.double().cpu(), labels.cpu().long()
    binary = len(y.unique()) == 2
    model = LogisticRegression(
        solver="lbfgs", tol=tolerance, max_iter=max_iter, warm_start=True, fit_intercept=intercept
    )
    found = []
    for l2 in penalties:
        # Of two classes scikit-learn fits the rows' difference w: l2 / 2 (|w / 2|^2 + |w / 2|^2) = l2 / 4 |w|^2.
        model.C = 1 / (len(x) * (l2 / 2 if binary else l2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
            model.fit(x.numpy(), y.numpy())
        weight, bias = _rows(model.coef_, model.intercept_, model.classes_, num_classes)
        norm = _gradient_norm(x, y, weight, bias, l2, intercept)
        at = features.device
        found.append(LogisticFit(weight.to(at), bias.to(at), norm, norm <= _NEAR * l2, int(max(model.n_iter_))))
    return found


def _rows(weight: np.ndarray, bias: np.ndarray, classes: np.ndarray, num_classes: int) -> tuple[Tensor, Tensor]:
    """A row for every class, also of two, and of those that have no data."""
    if len(classes) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    full = torch.zeros(num_classes, weight.shape[1], dtype=torch.float64)
    shift = torch.full((num_classes,), _NEVER, dtype=torch.float64)
    full[classes], shift[classes] = torch.from_numpy(weight), torch.from_numpy(bias)
    return full, shift


def _gradient_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float, intercept: bool) -> float:
    error = torch.addmm(bias, x, weight.T).softmax(1)
    error[torch.arange(len(y)), y] -= 1
    error /= len(y)
    of_weight = (error.T @ x + l2 * weight).flatten()
    return float((torch.cat([of_weight, error.sum(0)]) if intercept else of_weight).norm())
