"""Losses of readout guidance against the papers', written out as loops."""

import math

import pytest
import torch
from torch.nn import functional

from diffusers_repr.guidance.readout.appearance import appearance_loss
from diffusers_repr.guidance.readout.base import resize_target
from diffusers_repr.guidance.readout.drag import drag_loss
from diffusers_repr.guidance.readout.spatial import spatial_loss
from tests.guidance.readout_cases import (
    normal,
)


def cosine(a, b):
    return sum(u * v for u, v in zip(a, b, strict=True)) / math.sqrt(sum(u * u for u in a) * sum(v * v for v in b))


def test_spatial_loss_is_the_papers():
    r, target, x = normal(2, 3, 4, 5), normal(1, 3, 4, 5, seed=1), normal(2, 4, 6, 6, seed=2)
    a, b = -0.5, 0.5
    got = spatial_loss(r, target, x, (a, b))
    for n in range(2):
        low, high = float(x[n].min()), float(x[n].max())

        def phi(y, low=low, high=high):
            return (y - a) / (b - a) * (high - low) + low

        squares = [
            (phi(float(r[n, c, i, j])) - phi(float(target[0, c, i, j]))) ** 2
            for c in range(3)
            for i in range(4)
            for j in range(5)
        ]
        assert float(got[n]) == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    plain = spatial_loss(r, target, x, (a, b), rescale=False)
    torch.testing.assert_close(plain, (r - target).square().mean((1, 2, 3)), rtol=1e-12, atol=0)


def test_a_mask_weighs_places():
    r, target, x = normal(2, 2, 3, 4), normal(2, 2, 3, 4, seed=1), normal(2, 1, 6, 6, seed=2)
    weights = normal(2, 1, 3, 4, seed=3).abs()
    got = spatial_loss(r, target, x, (-1, 1), rescale=False, weights=weights)
    other = appearance_loss(r, target, x, rescale=False, weights=weights)
    for n in range(2):
        total = squares = cosines = 0.0
        for i in range(3):
            for j in range(4):
                w = float(weights[n, 0, i, j])
                total += w
                squares += w * float((r[n, :, i, j] - target[n, :, i, j]).square().mean())
                cosines += w * (1 - cosine(target[n, :, i, j].tolist(), r[n, :, i, j].tolist()))
        assert float(got[n]) == pytest.approx(squares / total, rel=1e-12)
        assert float(other[n]) == pytest.approx(cosines / total, rel=1e-9)


def test_appearance_loss_is_the_papers():
    r, reference, x = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), normal(2, 4, 6, 6, seed=2)
    got, plain = appearance_loss(r, reference, x), appearance_loss(r, reference, x, rescale=False)
    pooled = appearance_loss(r, reference, x, rescale=False, pooled=True)
    boxes = ((0, 1, 2, 4), (1, 0, 4, 5))
    boxed = appearance_loss(r, reference, x, rescale=False, boxes=boxes, pooled=True)
    for n in range(2):
        places = [(i, j) for i in range(4) for j in range(5)]
        parts = [1 - cosine(reference[n, :, i, j].tolist(), r[n, :, i, j].tolist()) for i, j in places]
        expected = sum(parts) / len(parts)
        assert float(plain[n]) == pytest.approx(expected, rel=1e-9)
        assert float(got[n]) == pytest.approx(expected * float(x[n].max() - x[n].min()) ** 2, rel=1e-9)
        means = [[float(part[n, c].mean()) for c in range(3)] for part in (reference, r)]
        assert float(pooled[n]) == pytest.approx(1 - cosine(*means), rel=1e-9)
        cut = functional.interpolate(reference[n : n + 1, :, 0:2, 1:4], (4, 5), mode="bilinear").mean((0, 2, 3))
        own = functional.interpolate(r[n : n + 1, :, 1:4, 0:5], (4, 5), mode="bilinear").mean((0, 2, 3))
        assert float(boxed[n]) == pytest.approx(1 - cosine(cut.tolist(), own.tolist()), rel=1e-9)


def test_drag_loss_is_the_papers():
    r, reference = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    points = [((0, 1), (3, 4)), ((2, 2), (1, 0)), ((3, 0), (3, 1))]
    got = drag_loss(r, reference, points)
    for n in range(2):

        def similar(p, q, n=n):
            return (cosine(reference[n, :, p[0], p[1]].tolist(), r[n, :, q[0], q[1]].tolist()) + 1) / 2

        expected = -0.5 * sum(similar(p, q) for p, q in points) / 3 + 0.5 * sum(similar(p, p) for p, _ in points) / 3
        assert float(got[n]) == pytest.approx(expected, rel=1e-9)


def test_targets_are_averaged_when_they_shrink():
    target = normal(1, 1, 4, 6)
    torch.testing.assert_close(resize_target(target, (2, 3)), functional.avg_pool2d(target, 2))
    grown = resize_target(target, (8, 12))
    torch.testing.assert_close(grown, functional.interpolate(target, (8, 12), mode="bilinear"))
    assert resize_target(target, (4, 6)) is target
