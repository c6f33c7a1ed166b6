"""AUROC, TAD, DCI and errors of reconstructions: by loops over pairs, by scikit-learn, by hand."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics import (
    area_under_roc,
    feature_distance,
    importance_scores,
    reconstruction_errors,
    ssim,
    total_auroc_difference,
)


def draw(rows, *columns, seed=0):
    return torch.randn(rows, *columns, generator=torch.Generator().manual_seed(seed))


def test_area_equals_pairs_and_scikit_learn_with_ties():
    scores = (draw(40, 3) * 2).round()  # few values, many ties
    truth = (draw(40, 2, seed=1) + scores[:, :2] > 0).long()
    found = area_under_roc(scores, truth)
    for k in range(2):
        for d in range(3):
            wins = pairs = 0.0
            for i in range(40):
                for j in range(40):
                    if truth[i, k] and not truth[j, k]:
                        wins += 1.0 if scores[i, d] > scores[j, d] else 0.5 if scores[i, d] == scores[j, d] else 0.0
                        pairs += 1
            assert float(found[k, d]) == pytest.approx(wins / pairs, abs=1e-12)
            assert float(found[k, d]) == pytest.approx(roc_auc_score(truth[:, k], scores[:, d]), abs=1e-12)


def by_hand(codes, names, columns, captured=0.75, redundant=0.2):
    """TAD from scikit-learn's areas, and entropies by counting."""
    total, kept = 0.0, []
    for name, y in zip(names, columns, strict=True):
        areas = sorted(max(a, 1 - a) for a in (roc_auc_score(y, codes[:, d]) for d in range(codes.shape[1])))
        n = len(y)

        def entropy(values, n=n):
            shares = [values.count(v) / n for v in set(values)]
            return -sum(p * math.log(p) for p in shares)

        mine = y.tolist()
        taken = 0.0
        for other in columns:
            if other is not y:
                both = list(zip(mine, other.tolist(), strict=True))
                mutual = entropy(mine) + entropy(other.tolist()) - entropy(both)
                taken = max(taken, mutual / entropy(mine))
        if areas[-1] >= captured and taken <= redundant:
            total += areas[-1] - areas[-2]
            kept.append(name)
    return total, tuple(kept)


def test_tad_is_the_sum_of_gaps_of_what_is_captured_and_not_told_twice():
    codes = draw(200, 4)
    first, second = (codes[:, 0] + 0.3 * draw(200, seed=1) > 0.4).long(), (codes[:, 1] + 0.5 * codes[:, 2] > 0).long()
    noise = (draw(200, seed=2) > 0).long()
    again = torch.where(torch.arange(200) % 10 == 0, 1 - first, first)  # tells most of the first
    names, columns = ["first", "second", "noise"], [first, second, noise]
    found = total_auroc_difference(codes, dict(zip(names, columns, strict=True)))
    value, kept = by_hand(codes, names, columns)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.captured == kept == ("first", "second")
    assert found.value > 0.3
    doubled = total_auroc_difference(codes, {"first": first, "again": again, "second": second})
    assert doubled.redundant == ("first", "again")
    assert doubled.captured == ("second",)
    assert total_auroc_difference(codes.exp() * 3, dict(zip(names, columns, strict=True))).value == pytest.approx(
        value
    )
    mirrored = total_auroc_difference(torch.cat([codes, -codes], 1), {"first": first})
    assert mirrored.value == pytest.approx(0, abs=1e-12)  # another number tells as much
    assert total_auroc_difference(codes, {"noise": noise}).value == 0


@pytest.mark.parametrize(
    ("codes", "attributes", "message"),
    [
        (draw(4, 1), {"a": torch.tensor([0, 1, 0, 1])}, "this code has one"),
        (draw(4, 2), {}, "one attribute at least"),
        (draw(4, 2), {"a": torch.tensor([1, 1, 1, 1])}, "the same in all 4 rows"),
        (draw(4, 2), {"a": torch.tensor([0, 2, 0, 1])}, "0 and 1 alone"),
    ],
)
def test_what_tad_refuses(codes, attributes, message):
    with pytest.raises(ValueError, match=message):
        total_auroc_difference(codes, attributes)


def test_dci_equals_loops_in_float64():
    importance = draw(5, 3).abs()
    rows = importance.double().tolist()

    def score(table):
        total, value = sum(map(sum, table)), 0.0
        for row in table:
            shares = [x / sum(row) for x in row]
            entropy = -sum(p * math.log(p, len(row)) for p in shares if p > 0)
            value += sum(row) / total * (1 - entropy)
        return value

    found = importance_scores(importance)
    assert found.disentanglement == pytest.approx(score(rows), abs=1e-12)
    assert found.completeness == pytest.approx(score([list(column) for column in zip(*rows, strict=True)]), abs=1e-12)
    one_to_one = torch.zeros(4, 2)
    one_to_one[0, 0] = one_to_one[3, 1] = 2.0  # numbers without importance weigh nothing
    assert importance_scores(one_to_one) == pytest.approx((1.0, 1.0))
    shared = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # one number for both
    assert importance_scores(shared) == pytest.approx((0.0, 1.0))
    with pytest.raises(ValueError, match="tells none of them"):
        importance_scores(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="absolute value"):
        importance_scores(-torch.ones(2, 2))
    with pytest.raises(ValueError, match="two of each"):
        importance_scores(torch.ones(2, 1))


def test_errors_of_reconstructions():
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    worse = images + torch.tensor([0.0, 0.1, 0.5])[:, None, None, None]  # some leave [0, 1], and are clipped
    net = nn.Conv2d(1, 4, 2, stride=2)
    encoder = Encoder.from_module(net, patch_size=2, channels=1)
    found = reconstruction_errors(images, worse, encoder, batch_size=2)
    clipped = worse.clamp(0, 1)
    for row in range(3):
        assert float(found["mse"][row]) == pytest.approx(float(((clipped - images)[row] ** 2).mean()), abs=1e-7)
    assert torch.allclose(found["ssim"], ssim(images, clipped, window=7).double(), atol=1e-6)
    assert [float(found[name][0]) for name in ("mse", "ssim", "feature_distance")] == pytest.approx(
        [0, 1, 0], abs=1e-9
    )
    with torch.no_grad():
        u, v = (net(2 * x - 1).flatten(2).double() for x in (images, clipped))
    each = []
    for row in range(3):
        total = 0.0
        for at in range(16):
            a, b = (w[row, :, at] / w[row, :, at].norm() for w in (u, v))
            total += float(((a - b) ** 2).sum()) / 16
        each.append(total)
    assert feature_distance(encoder, images, clipped).tolist() == pytest.approx(each, abs=1e-6)
    with pytest.raises(ValueError, match="of one shape"):
        reconstruction_errors(images, worse[:2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        reconstruction_errors(images, worse * torch.inf)
