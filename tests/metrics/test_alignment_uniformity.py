"""Alignment and uniformity: closed forms, the paper's loop, and limits."""

import math

import pytest
import torch
from torch.nn import functional

from diffusers_repr import Denoiser, FeatureExtractor, NoiseLevel
from diffusers_repr.metrics import alignment_uniformity
from diffusers_repr.metrics.alignment_uniformity import alignment, uniformity
from tests.testers.models import build


def test_closed_forms():
    one = torch.tensor([[3.0, 4.0]])
    assert float(uniformity(one.expand(5, 2))) == pytest.approx(0, abs=1e-12)
    assert float(uniformity(torch.cat([one, -2 * one]))) == pytest.approx(-8)
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert float(uniformity(square)) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))
    assert float(alignment(one, 7 * one)) == 0
    assert float(alignment(one, -one)) == pytest.approx(4)
    with pytest.raises(ValueError, match="pairs of rows"):
        uniformity(one)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pipe(build("ddpm"))


def test_the_loop_of_the_paper(denoiser):
    """Batches of the images in order, averaged by their images; a last image alone is no batch."""
    images = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    extractor = FeatureExtractor(denoiser, ["mid_block", "up_blocks.0"], [10, 300], pooling="mean")
    found = alignment_uniformity(extractor, images, 4)
    assert [(one.layer, one.timestep) for one in found[1:3]] == [("up_blocks.0", 10), ("mid_block", 300)]
    first, second = (functional.normalize(read(images)["up_blocks.0"][0].double(), dim=1) for read in (
        extractor, extractor.replace(seed=2**34)
    ))  # fmt: skip
    sums = [0.0, 0.0]
    for rows in (slice(0, 4), slice(4, 9)):
        a, b = first[rows], second[rows]
        sums[0] += float((a - b).norm(dim=1).pow(2).mean()) * len(a)
        uniform = [torch.pdist(x).pow(2).mul(-2).exp().mean().log() for x in (a, b)]
        sums[1] += float(sum(uniform)) / 2 * len(a)
    assert found[1].alignment == pytest.approx(sums[0] / 9, rel=1e-6)
    assert found[1].uniformity == pytest.approx(sums[1] / 9, rel=1e-6)


def test_alignment_goes_to_0_with_the_noise(denoiser):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = [NoiseLevel(timestep=t) for t in (0, 100, 500)]
    found = alignment_uniformity(FeatureExtractor(denoiser, "mid_block", levels, pooling="mean"), images, 4)
    assert found[0].alignment < found[1].alignment / 10 < found[2].alignment / 10
    assert found[0].alignment < 1e-3
    assert all(-8 <= one.uniformity <= 0 for one in found)


def test_bad_input(denoiser):
    images = torch.rand(3, 1, 8, 8)
    for settings, said in (({"pooling": None}, "takes vectors"), ({"noise": "clean"}, "two draws of its own noise")):
        with pytest.raises(ValueError, match=said):
            alignment_uniformity(FeatureExtractor(denoiser, "mid_block", 5, **{"pooling": "mean", **settings}), images)
    with pytest.raises(ValueError, match="compares images"):
        alignment_uniformity(FeatureExtractor(denoiser, "mid_block", 5, pooling="mean"), images[:1])
