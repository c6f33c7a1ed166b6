"""DCI of a code: what of attributes it tells, and whether by numbers of their own, by forests or sparse lines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.metrics.checks import check_rows
from diffusers_repr.metrics.dci import importance_scores

Predictor = Literal["forest", "boosting", "lasso"]
_TREES = 100


@dataclass(frozen=True)
class DCIScore:
    """Disentanglement, completeness and informativeness.

    Attributes:
        disentanglement: See `importance_scores`.
        completeness: Likewise.
        informativeness: Mean over the attributes of how well they are told from test rows: accuracy of classes, R^2 of
            numbers (1 less the mean squared error in units of the test rows' variance).
        each: The same of every attribute, by name.
        importance: `(D, K)`: of each number for each attribute, columns summing to 1.
        predictor: What was fitted.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    each: Mapping[str, float]
    importance: Tensor
    predictor: str


def dci_score(
    codes: Tensor,
    attributes: Mapping[str, Tensor],
    test_codes: Tensor,
    test_attributes: Mapping[str, Tensor],
    *,
    predictor: Predictor = "forest",
    seed: int = 0,
) -> DCIScore:
    """DCI (Eastwood and Williams 2018): one predictor of each attribute from the whole code, and what it looks at.

    Codes, and attributes that are numbers, are standardised by the training rows. Importances of one attribute sum to
    1, so that no attribute counts for more because of its unit.

    Args:
        codes: `(N, D)`.
        attributes: Name -> `(N,)`: whole numbers are classes, other numbers are numbers.
        test_codes: `(M, D)`; predictors are measured on them.
        test_attributes: The same names.
        predictor: `forest`: a random forest of 100 trees, the paper's; `boosting`: gradient-boosted trees, those of
            most published tables, slow with many classes; `lasso`: the paper's other one, its penalty chosen by
            cross-validation, for numbers and two classes.
        seed: Of forests and folds.

    Raises:
        ValueError: For fewer than two numbers or attributes, rows that do not fit, an unknown predictor, or classes
            that it does not take.
    """
    if predictor not in get_args(Predictor):
        raise ValueError(f"Unknown predictor {predictor!r}; expected one of {', '.join(get_args(Predictor))}.")
    check_rows(codes, "codes", least=2)
    check_rows(test_codes, "test_codes")
    if codes.shape[1] != test_codes.shape[1]:
        raise ValueError(f"codes have {codes.shape[1]} numbers, test_codes {test_codes.shape[1]}; use one encoder.")
    if len(attributes) < 2 or min(codes.shape[1], test_codes.shape[1]) < 2:
        raise ValueError(
            f"DCI needs two numbers and two attributes at least; got {codes.shape[1]} and {len(attributes)}."
        )
    if list(attributes) != list(test_attributes):
        raise ValueError(f"Attributes are {list(attributes)} and of the test {list(test_attributes)}; name the same.")
    mean, std = codes.double().mean(0), codes.double().std(0, correction=0).clamp(min=1e-12)
    x, other = (((rows.double() - mean) / std).cpu().numpy() for rows in (codes, test_codes))
    columns, each = [], {}
    for name, values in attributes.items():
        y, z = (torch.as_tensor(one).detach().cpu() for one in (values, test_attributes[name]))
        _check_attribute(name, y, z, len(codes), len(test_codes))
        importance, each[name] = _fit(predictor, seed, name, x, y, other, z)
        total = float(importance.sum())
        columns.append(importance / total if total > 0 else importance)
    matrix = torch.stack(columns, 1)
    scores = importance_scores(matrix)
    informative = sum(each.values()) / len(each)
    return DCIScore(scores.disentanglement, scores.completeness, informative, each, matrix, predictor)


def _check_attribute(name: str, y: Tensor, z: Tensor, rows: int, test_rows: int) -> None:
    for values, count, what in ((y, rows, "training"), (z, test_rows, "test")):
        if values.ndim != 1 or len(values) != count:
            raise ValueError(f"Attribute {name!r} has shape {tuple(values.shape)} for {count} {what} rows.")
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"Attribute {name!r} has {what} rows that are not finite.")
    if y.is_floating_point() != z.is_floating_point():
        raise ValueError(f"Attribute {name!r} is of classes in one split and of numbers in the other.")
    if bool((y == y[0]).all()) or bool((z == z[0]).all()):
        raise ValueError(f"Attribute {name!r} is the same in all rows of a split; nothing can be told apart.")


def _fit(predictor: Predictor, seed: int, name: str, x: Any, y: Tensor, other: Any, z: Tensor) -> tuple[Tensor, float]:
    """Importance `(D,)` of the numbers for one attribute, and how well test rows are told."""
    numbers = y.is_floating_point()
    if numbers:
        mean, std = y.double().mean(), y.double().std(correction=0)
        targets, truth = ((values.double() - mean) / std for values in (y, z))
    else:
        targets, truth = y.long(), z.long()
    if predictor == "lasso":
        if not numbers and len(targets.unique()) > 2:
            raise ValueError(
                f"predictor='lasso' tells numbers and two classes; {name!r} has {len(targets.unique())} classes. Take "
                "'forest', or one attribute a class (one-hot)."
            )
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LassoCV

        model: Any = LassoCV(random_state=seed)
        values = targets.double() if numbers else (targets == targets.max()).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of the weakest penalties, which are not chosen
            model.fit(x, values.numpy())
        weights = torch.as_tensor(model.coef_).abs().double()
        said = torch.as_tensor(model.predict(other))
        if not numbers:
            said = torch.where(said > 0.5, targets.max(), targets.min())
    else:
        model = _trees(predictor, numbers, seed)
        model.fit(x, targets.numpy())
        weights = torch.as_tensor(model.feature_importances_).double()
        said = torch.as_tensor(model.predict(other))
    if not numbers:
        return weights, float((said == truth).double().mean())
    return weights, float(1 - (said - truth).square().mean() / (truth - truth.mean()).square().mean())


def _trees(predictor: Predictor, numbers: bool, seed: int) -> Any:
    from sklearn import ensemble

    kind = "RandomForest" if predictor == "forest" else "GradientBoosting"
    made = getattr(ensemble, kind + ("Regressor" if numbers else "Classifier"))
    return made(n_estimators=_TREES, random_state=seed)


__all__ = ["DCIScore", "Predictor", "dci_score"]
