"""The study's pairs have the truth they claim, and the study runs."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_repr.data import known_pairs

import correspondence  # isort: skip


def at(image, points):
    """Colours at points, bilinear."""
    pixels = np.asarray(image, float)
    x, y = points.T
    left, top = np.floor(x).astype(int).clip(0, image.width - 2), np.floor(y).astype(int).clip(0, image.height - 2)
    a, b = (x - left)[:, None], (y - top)[:, None]
    upper = pixels[top, left] * (1 - a) + pixels[top, left + 1] * a
    return upper * (1 - b) + (pixels[top + 1, left] * (1 - a) + pixels[top + 1, left + 1] * a) * b


@pytest.mark.parametrize("kind", [*known_pairs.KINDS, "stereo"])
def test_points_lie_where_the_truth_says(kind):
    if kind == "stereo":
        source, target, mapped = known_pairs.motorcycle()
    else:
        source = known_pairs.photograph("coffee")
        target, mapped = known_pairs.changed(source, kind, seed=3)
    rng = np.random.default_rng(0)
    points = rng.uniform((2, 2), (source.width - 3, source.height - 3), (400, 2))
    truth = mapped(points)
    inside = (truth >= 1).all(1) & (truth <= (target.width - 2, target.height - 2)).all(1)
    assert inside.sum() > 60
    here, there = at(source, points[inside]).mean(1), at(target, truth[inside]).mean(1)
    assert np.corrcoef(here, there)[0, 1] > (0.85 if kind == "stereo" else 0.95)
    beside = truth[inside] + 6  # and not six pixels away
    beside = beside.clip(0, (target.width - 2, target.height - 2))
    assert np.corrcoef(here, at(target, beside).mean(1))[0, 1] < np.corrcoef(here, there)[0, 1] - 0.02


@pytest.mark.slow
def test_the_study(tmp_path):
    small = [
        "--timesteps",
        "50",
        "--seeds",
        "0",
        "--points",
        "8",
        "--photographs",
        "chelsea",
        "--image_size",
        "32",
        "48",
    ]
    correspondence.main([*small, "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) == 4
    assert report["pairs"] == 6
    assert all(
        0 <= share <= 1 for row in report["rows"].values() for found in row.values() for share in found.values()
    )
    for name in ("matches.jpg", "similarity.jpg", "changes.jpg"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
