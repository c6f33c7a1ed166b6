"""Probes, heads and classifiers that were saved by version 0.1 still load, and give the numbers they gave then."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_repr import Denoiser
from diffusers_repr.heads import DepthHead, ReadoutHead, read_features
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.tasks import Probe
from tests.tasks.planted import images, pipeline

OLD = Path(__file__).parents[1] / "data" / "old"
NUMBERS = json.loads((OLD / "numbers.json").read_text())


def of_old(name: str) -> torch.Tensor:
    return torch.tensor(NUMBERS[name])


def sample() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 256).view(2, 1, 16, 16)


def test_a_probe():
    probe = Probe.from_pretrained(OLD / "probe", base=pipeline())
    torch.testing.assert_close(probe.logits(images(4, seed=5)[0]), of_old("probe"), atol=1e-4, rtol=1e-4)
    assert probe.recipe.to_dict() == json.loads((OLD / "probe/probe.json").read_text())
    with pytest.warns(UserWarning, match="other weights than the probe's base .'user/base'."):
        Probe.from_pretrained(OLD / "probe", base=pipeline(seed=1))


@pytest.mark.parametrize(("name", "make"), [("readout_head", ReadoutHead), ("depth_head", DepthHead)])
def test_a_head_on_maps(name, make):
    head, denoiser = make.from_pretrained(OLD / name), Denoiser.from_pipe(pipeline())
    head.check_base(denoiser)
    with torch.no_grad():
        found = head(read_features(denoiser, sample(), 261, None, head.config["layers"]), 261)
    torch.testing.assert_close(found[:, 0, ::5, ::5], of_old(name), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has another config .block_out_channels is .16, 32., was .8, 16."):
        head.check_base(Denoiser.from_pipe(pipeline(block_out_channels=(16, 32))))


def test_a_classifier():
    model, denoiser = NoisyClassifier.from_pretrained(OLD / "classifier"), Denoiser.from_pipe(pipeline())
    model.check_base(denoiser.schedule, 1)
    with torch.no_grad():
        logits = model(sample(), torch.tensor([3, 900]))
    torch.testing.assert_close(logits, of_old("classifier"), atol=1e-4, rtol=1e-4)
