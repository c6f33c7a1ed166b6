"""Closed-form linear models against scikit-learn, and sums against the whole matrix."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from diffusers_repr.heads.fitting.closed_form import (
    PENALTIES,
    Moments,
    check_penalties,
    lda_path,
    ridge_path,
    standardise,
)

ROWS, DIM, CLASSES = 90, 12, 3


@pytest.fixture(scope="module")
def data():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    mixing = torch.randn(DIM, DIM, generator=rng, dtype=torch.float64)
    features = torch.randn(ROWS, DIM, generator=rng, dtype=torch.float64) @ mixing + 50
    features[:, :CLASSES] += 2 * torch.nn.functional.one_hot(labels, CLASSES)
    return features, labels, torch.nn.functional.one_hot(labels, CLASSES).double()


def sums(features, targets, sizes=(ROWS,), order=None):
    moments = Moments(features.shape[1], targets.shape[1])
    order = torch.arange(len(features)) if order is None else order
    for part in order.split(list(sizes)):
        moments.add(features[part], targets[part])
    return moments


def test_equals_scikit_learns_ridge(data):
    features, _, targets = data
    path = ridge_path(sums(features, targets))
    scaled = StandardScaler().fit(features.numpy())
    for at, penalty in enumerate(PENALTIES):
        oracle = Ridge(alpha=ROWS * penalty).fit(scaled.transform(features.numpy()), targets.numpy())
        expected = oracle.predict(scaled.transform(features.numpy()))
        np.testing.assert_allclose(path.predict(features)[at].numpy(), expected, atol=1e-9)


def test_equals_scikit_learns_lda(data):
    features, labels, targets = data
    scaled = StandardScaler().fit_transform(features.numpy())
    path = lda_path(sums(features, targets), [1e-12])
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(scaled, labels.numpy())
    # scikit-learn weighs class covariances by their priors: the same within-class covariance as ours
    expected = oracle.predict_log_proba(scaled)
    np.testing.assert_allclose(path.predict(features)[0].log_softmax(1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("fit", [ridge_path, lda_path])
def test_streaming_equals_one_shot_in_any_order(data, fit):
    features, _, targets = data
    whole = fit(sums(features, targets)).predict(features)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    for sizes in ((1, 7, 60, 22), (30, 30, 30)):
        parts = fit(sums(features, targets, sizes, order)).predict(features)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_cells_are_solved_as_if_alone(data):
    features, _, targets = data
    other = features.flip(1) ** 2
    together = Moments(DIM, CLASSES, cells=2)
    together.add(features, targets, 0)
    together.add(other, targets, 1)
    path = ridge_path(together)
    for cell, rows in enumerate((features, other)):
        torch.testing.assert_close(path.predict(rows, cell), ridge_path(sums(rows, targets)).predict(rows))


def test_taking_columns_equals_summing_them(data):
    features, _, targets = data
    columns = [7, 2, 9]
    part = ridge_path(sums(features, targets).take(columns)).predict(features[:, columns])
    torch.testing.assert_close(part, ridge_path(sums(features[:, columns], targets)).predict(features[:, columns]))


@pytest.mark.parametrize("fit", [ridge_path, lda_path])
def test_coefficients_give_the_predictions(data, fit):
    features, _, targets = data
    path = fit(sums(features, targets))
    weight, bias = path.coefficients(4)
    torch.testing.assert_close(features @ weight.T + bias, path.predict(features)[4])


def test_a_large_mean_costs_no_digits(data):
    features, _, targets = data
    far = features + 1e6
    torch.testing.assert_close(
        ridge_path(sums(far, targets)).predict(far),
        ridge_path(sums(features, targets)).predict(features),
        atol=1e-6,
        rtol=0,
    )


def test_constant_features_change_nothing(data):
    features, _, targets = data
    wide = torch.cat([features, torch.full((ROWS, 1), 3.0), torch.zeros(ROWS, 1)], dim=1)
    wide[:, -2] += 1e-7 * torch.randn(ROWS, generator=torch.Generator().manual_seed(0))  # rounding, not information
    torch.testing.assert_close(
        ridge_path(sums(wide, targets)).predict(wide), ridge_path(sums(features, targets)).predict(features)
    )


def test_more_features_than_rows(data):
    features, _, targets = data
    few = slice(0, 8)
    out = ridge_path(sums(features[few], targets[few], (8,))).predict(features[few])
    assert torch.isfinite(out).all()


def test_errors(data):
    features, _, targets = data
    with pytest.raises(ValueError, match="at least 2 rows"):
        standardise(sums(features[:1], targets[:1], (1,)))
    for bad in ([], [0.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="penalties"):
            check_penalties(bad)
    absent = torch.cat([targets, torch.zeros(ROWS, 1)], dim=1)
    with pytest.raises(ValueError, match="every class"):
        lda_path(sums(features, absent))
