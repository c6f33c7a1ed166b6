"""Intersections over unions: by hand, by sets of pixels, by torchmetrics."""

import numpy as np
import pytest
import torch

from diffusers_repr.metrics import ConfusionMatrix, mean_iou


def by_sets(predicted, truth, classes, ignore, masked):
    """Each class's pixels as sets of places; a class that counts nowhere is left out."""
    scores = {}
    known = {place for place, c in enumerate(truth) if c != ignore}
    for c in range(classes):
        if c == ignore:
            continue
        told = {place for place, p in enumerate(predicted) if p == c and (place in known or not masked)}
        true = {place for place, t in enumerate(truth) if t == c}
        if true or not masked:
            scores[c] = len(told & true) / (len(told | true) + (0 if masked else 1e-8))
    return scores


def test_the_example_of_two_by_two():
    predicted, truth = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [0, 255]])
    matrix = ConfusionMatrix(2, ignore_index=255)
    matrix.update(predicted, truth)
    assert matrix.iou("legacy").tolist() == pytest.approx([1 / 2, 1 / 3], abs=1e-7)
    assert matrix.iou("masked").tolist() == [1 / 2, 1 / 2]
    assert matrix.accuracy() == 2 / 3
    assert mean_iou(predicted, truth, 2, 255, "legacy") == pytest.approx(5 / 12, abs=1e-7)


@pytest.mark.parametrize("ignore", [255, 0, None])
def test_both_ways_of_counting_over_several_images(ignore):
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 4, (3, 5, 7))  # class 4 never occurs, and is predicted
    predicted = np.where(generator.random(truth.shape) < 0.5, truth, generator.integers(0, 5, truth.shape))
    if ignore == 255:
        truth[generator.random(truth.shape) < 0.2] = 255
    matrix = ConfusionMatrix(6, ignore)  # nor does 5, which nobody predicts
    for one, other in zip(predicted, truth, strict=True):
        matrix.update(one, other)
    for counting in ("masked", "legacy"):
        expected = by_sets(predicted.ravel().tolist(), truth.ravel().tolist(), 6, ignore, counting == "masked")
        found = {c: float(v) for c, v in enumerate(matrix.iou(counting)) if not v.isnan()}
        assert found == pytest.approx(expected, abs=1e-12)
        assert matrix.mean_iou(counting) == pytest.approx(sum(expected.values()) / len(expected), abs=1e-12)


def test_masked_is_that_of_torchmetrics():
    segmentation = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (4, 9, 9), generator=generator)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, truth.roll(1, 0))
    truth[:, 0] = 255
    matrix = ConfusionMatrix(5, 255)
    matrix.update(predicted, truth)
    for average, ours in (("none", matrix.iou()), ("macro", torch.tensor(matrix.mean_iou(), dtype=torch.float64))):
        theirs = segmentation.MulticlassJaccardIndex(5, average, ignore_index=255)
        torch.testing.assert_close(ours, theirs(predicted, truth).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([0, 2], [0, 1], "The prediction has the id 2; classes are 0 to 1, and ignore_index=255 in the truth"),
        ([0, 255], [0, 255], "The prediction has the id 255"),
        ([0, 1], [0, -1], "The truth has the id -1"),
        ([0, 1], [0, 3], "The truth has the id 3"),
        ([0, 1], [0, 2], "The truth has the id 2; classes are 0 to 1"),
        ([0, 1], [[0, 1]], r"The prediction is \(2,\), the truth \(1, 2\)"),
        ([0.5, 1.0], [0, 1], "whole numbers"),
    ],
)
def test_what_is_no_class(predicted, truth, message):
    matrix = ConfusionMatrix(2, 255)
    with pytest.raises(ValueError, match=message):
        matrix.update(predicted, truth)
    assert not matrix.counts.any()


def test_nothing_to_measure():
    matrix = ConfusionMatrix(2, 255)
    matrix.update([0, 1], [255, 255])
    for ask in (matrix.mean_iou, matrix.accuracy):
        with pytest.raises(ValueError, match="all were ignored"):
            ask()
    with pytest.raises(ValueError, match="expected one of masked, legacy"):
        matrix.iou("micro")
    with pytest.raises(ValueError, match="The truth has the id 2; classes are 0 to 1"):
        ConfusionMatrix(2).update([0], [2])
