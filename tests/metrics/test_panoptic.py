"""Panoptic quality against its definition written out over sets of pixels; segments from queries."""

import numpy as np
import pytest
import torch

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.metrics import panoptic_inference, panoptic_quality


def of(rows, classes, crowds=()):
    return PanopticMap(torch.tensor(rows), classes, frozenset(crowds))


def by_definition(predicted, truth, classes):
    """IoU sum, TP, FP and FN a class: sets of places, one rule of the specification a line."""
    sums = np.zeros((4, classes))
    for p_map, g_map in zip(predicted, truth, strict=True):
        places = {
            name: {n: {k for k, value in enumerate(m.ids.flatten().tolist()) if value == n} for n in (0, *m.classes)}
            for name, m in (("p", p_map), ("g", g_map))
        }
        void, matched_p, matched_g = places["g"][0], set(), set()
        for p, p_class in p_map.classes.items():
            for g, g_class in g_map.classes.items():
                a, b = places["p"][p], places["g"][g]
                union = len(a) + len(b) - len(a & b) - len(a & void)
                if p_class == g_class and g not in g_map.crowds and len(a & b) / union > 0.5:
                    sums[:2, p_class] += len(a & b) / union, 1
                    matched_p.add(p)
                    matched_g.add(g)
        for p, p_class in p_map.classes.items():
            a, on = places["p"][p], set(void)
            for g in g_map.crowds:
                on |= places["g"][g] if g_map.classes[g] == p_class else set()
            if p not in matched_p and len(a & on) / len(a) <= 0.5:
                sums[2, p_class] += 1
        for g, g_class in g_map.classes.items():
            sums[3, g_class] += g not in matched_g and g not in g_map.crowds
    return sums


def counts(scores):
    sums = (scores.iou_sum, scores.true_positives, scores.false_positives, scores.false_negatives)
    return np.stack([values.double().numpy() for values in sums])


def test_perfect_halved_and_exactly_half():
    true = of([[1, 1, 2, 2]], {1: 0, 2: 1})
    assert panoptic_quality([true], [true], 2).mean() == 1.0
    halves = panoptic_quality([of([[1, 2]], {1: 0, 2: 0})], [of([[1, 1]], {1: 0})], 1)
    assert counts(halves)[:, 0].tolist() == [0, 0, 2, 1]
    assert halves.mean() == 0.0
    half = panoptic_quality([of([[1, 0, 0, 0]], {1: 0})], [of([[1, 1, 0, 0]], {1: 0})], 1)
    assert counts(half)[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        # Void of the truth leaves the union: 2 of 2 though the prediction has 4 pixels.
        (of([[1, 1, 1, 1]], {1: 0}), of([[1, 1, 0, 0]], {1: 0}), [1, 1, 0, 0]),
        # Void of the prediction does not: 2 of 5, and the true segment is missed.
        (of([[1, 1, 0, 0, 0]], {1: 0}), of([[1, 1, 1, 1, 1]], {1: 0}), [0, 0, 1, 1]),
        # More than half on void: not counted. Exactly half: counted.
        (of([[1, 1, 1, 0]], {1: 0}), of([[2, 0, 0, 2]], {2: 1}), [0, 0, 0, 0]),
        (of([[1, 1, 1, 1]], {1: 0}), of([[2, 2, 0, 0]], {2: 1}), [0, 0, 1, 0]),
        # A crowd is never matched nor missed, and forgives predictions of its class alone.
        (of([[1, 1, 1, 0]], {1: 0}), of([[1, 1, 1, 1]], {1: 0}, [1]), [0, 0, 0, 0]),
        (of([[1, 1, 1, 0]], {1: 0}), of([[1, 1, 1, 1]], {1: 1}, [1]), [0, 0, 1, 0]),
        # Crowd pixels stay in the union: 2 of 4 is no match; half on the crowd is not more than half.
        (of([[1, 1, 1, 1]], {1: 0}), of([[1, 1, 2, 2]], {1: 0, 2: 0}, [2]), [0, 0, 1, 1]),
        # Mostly on void and crowd, but it matches: void 2, crowd 1, segment 2 of 3.
        (of([[1, 1, 1, 1, 1]], {1: 0}), of([[1, 1, 2, 0, 0]], {1: 0, 2: 0}, [2]), [2 / 3, 1, 0, 0]),
    ],
)  # fmt: skip
def test_each_rule(predicted, true, expected):
    assert by_definition([predicted], [true], 2)[:, 0].tolist() == pytest.approx(expected)
    assert counts(panoptic_quality([predicted], [true], 2))[:, 0].tolist() == pytest.approx(expected)


def test_random_maps_over_several_images():
    rng, predicted, truth = np.random.default_rng(0), [], []
    for _ in range(30):
        ids = np.repeat(rng.integers(0, 6, (4, 5)), 3, axis=1)
        told = np.where(rng.random(ids.shape) < 0.75, ids, rng.integers(0, 6, ids.shape))
        labels = {n: int(rng.integers(0, 3)) for n in range(1, 6)}
        crowds = {n for n in labels if rng.random() < 0.3} & set(ids.flatten().tolist())
        other = {n: label if rng.random() < 0.8 else 2 - label for n, label in labels.items()}
        truth.append(of(ids.tolist(), {n: labels[n] for n in np.unique(ids).tolist() if n}, crowds))
        predicted.append(of(told.tolist(), {n: other[n] for n in np.unique(told).tolist() if n}))
    expected, scores = by_definition(predicted, truth, 4), panoptic_quality(predicted, truth, 4)
    assert (expected[:, :3] > 0).all()
    np.testing.assert_allclose(counts(scores), expected)
    iou, tp, fp, fn = expected[:, :3]
    quality = iou / (tp + fp / 2 + fn / 2)
    assert scores.mean() == pytest.approx(quality.mean())
    assert scores.mean([1]) == pytest.approx(quality[1])
    assert scores.panoptic_quality()[3].isnan()
    torch.testing.assert_close(
        scores.segmentation_quality() * scores.recognition_quality(), scores.panoptic_quality(), equal_nan=True
    )


def test_what_is_refused():
    true = of([[1, 1]], {1: 0})
    for predicted, known, message in (
        (of([[1]], {1: 0}), 1, "1 x 1, the truth 1 x 2"),
        (of([[1, 1]], {1: 3}), 1, "prediction has the class 3"),
        (of([[1, 1]], {1: 0}, [1]), 1, "has crowds"),
    ):
        with pytest.raises(ValueError, match=message):
            panoptic_quality([predicted], [true], known)
    with pytest.raises(ValueError, match="nothing to measure"):
        panoptic_quality([true], [true], 2).mean([1])
    with pytest.raises(ValueError, match="zip"):
        panoptic_quality([true, true], [true], 1)
    for rows, classes, crowds, message in (
        ([[1, 2]], {1: 0}, (), "no class"),
        ([[1, 1]], {1: 0, 2: 0}, (), "no pixel"),
        ([[1, 1]], {1: 0}, (2,), "no segments"),
        ([[1, 1]], {1: -1}, (), "from 0 on"),
        ([1, 1], {1: 0}, (), "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            of(rows, classes, crowds)


def test_segments_of_queries():
    probabilities = torch.tensor(
        [[0.9, 0.0, 0.1], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.0, 0.5, 0.5 - 1e-3], [0.1, 0.2, 0.7], [0.1, 0.4, 0.3]]
    )
    masks = torch.tensor(
        [
            [0.9, 0.9, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0],  # a thing
            [0.0, 0.7, 0.7, 0.7, 0.0, 0.0, 0.0, 0.0],  # loses a pixel of three to it: 2/3 < 0.8
            [0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0],  # stuff
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.4, 0.0],  # the same stuff; 0.4 is not of the mask
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # background
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4],  # a mask that is nowhere 0.5
        ]
    )[:, None]
    found, scores = panoptic_inference(probabilities, masks, stuff=[1])
    assert found.ids.tolist() == [[1, 1, 0, 0, 2, 2, 0, 0]]
    assert found.classes == {1: 0, 2: 1}
    assert scores == pytest.approx({1: 0.9, 2: 0.6})
    apart, _ = panoptic_inference(probabilities, masks)
    assert apart.ids.tolist() == [[1, 1, 0, 0, 2, 3, 0, 0]]
    looser, _ = panoptic_inference(probabilities, masks, [1], overlap=0.6)
    assert looser.ids.tolist() == [[1, 1, 2, 2, 3, 3, 0, 0]]
    strict, _ = panoptic_inference(probabilities, masks, [1], threshold=0.9)
    assert not strict.classes
    with pytest.raises(ValueError, match="one row a query"):
        panoptic_inference(probabilities[:2], masks)
