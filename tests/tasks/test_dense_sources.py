"""Hyperfeatures and networks tuned by CleanDIFT where tasks take a source of features: matched, fitted, saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.features import cleandift_extractor
from diffusers_repr.heads import Hyperfeatures, HyperfeaturesHead
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.objectives import CleanDIFTConfig, CleanDIFTObjective
from diffusers_repr.tasks import Probe, Segmenter
from diffusers_repr.tasks.correspondence import Correspondence
from tests.tasks.planted import images as classified
from tests.tasks.planted import pipeline
from tests.tasks.planted_masks import annotated, small
from tests.testers.models import build


def hyperfeatures() -> Hyperfeatures:
    torch.manual_seed(0)
    denoiser = Denoiser.from_pipe(pipeline())
    head = HyperfeaturesHead.for_base(denoiser, steps=4, reads=[0, 2], width=8, bottleneck=4)
    return Hyperfeatures(denoiser, head, batch_size=4)


def cleandift(folder):
    torch.manual_seed(0)
    objective = CleanDIFTObjective(Denoiser.from_pipe(pipeline()), CleanDIFTConfig("made", time_width=8))
    objective.save_pretrained(folder, objective.state_dict(), torch.float32)
    return cleandift_extractor(folder, ["mid_block", "up_blocks.0"])


@pytest.mark.parametrize("kind", ["hyperfeatures", "cleandift"])
def test_points_are_found(kind, tmp_path):
    """Each point of an image in the image itself, by a map as fine as the image."""
    source = hyperfeatures() if kind == "hyperfeatures" else cleandift(tmp_path)
    layer = None if kind == "hyperfeatures" else "up_blocks.0"
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    image = np.array(coarse)[::2, ::2]
    task = Correspondence(source, layer)
    points = [[3, 4], [8, 8], [12, 3]]
    same = task(Image.fromarray(image), Image.fromarray(image), points)
    assert torch.equal(same.matches, torch.tensor(points, dtype=torch.float32))
    assert float(same.scores.min()) > 0.999


@pytest.mark.parametrize("kind", ["hyperfeatures", "cleandift"])
def test_a_segmenter_is_fitted_saved_and_loaded(kind, tmp_path):
    source = hyperfeatures() if kind == "hyperfeatures" else cleandift(tmp_path / "tuned")
    segmenter = small(source)
    images, masks = annotated(3, seed=2)
    found = segmenter.evaluate((images, masks), record=False)["mean_iou"]
    assert found > 0.4  # all ground: 0.25
    segmenter.save_pretrained(tmp_path / "segmenter")
    base = {"base": source.denoiser} if kind == "hyperfeatures" else {}  # one without a name
    again = Segmenter.from_pretrained(tmp_path / "segmenter", **base)
    for one, other in zip(again(images).masks, segmenter(images).masks, strict=True):
        assert torch.equal(one, other)


def test_a_probe_is_fitted_saved_and_loaded(tmp_path):
    """On pooled maps of a source that is no extractor, whose features it joins as they are."""
    source = hyperfeatures()
    data = classified(24, seed=3)
    probe = Probe.fit(source, classified(60), classified(30, seed=1), pooling="adaptive:2", protocol="ridge", seed=5)
    assert probe.evaluate(data, record=False)["accuracy"] > 0.6  # chance: 1/3
    maps = source(data[0])["hyperfeatures"]
    want = probe.head(torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1))
    torch.testing.assert_close(probe.logits(data[0]), want, atol=1e-4, rtol=1e-4)
    probe.save_pretrained(tmp_path / "probe")
    recipe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert (recipe["source"], recipe["seed"], recipe["layers"]) == ("Hyperfeatures", 5, ["hyperfeatures"])
    assert "`source/`" in (tmp_path / "probe" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "probe" / "source").iterdir() if path.suffix != ".py") == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    pushed = plan_upload(tmp_path / "probe", "probe")
    assert {"source/config.json", "source/diffusion_pytorch_model.safetensors"} <= {file.path for file in pushed.files}
    for given in ({"source": source}, {"base": source.denoiser}):
        again = Probe.from_pretrained(tmp_path / "probe", **given)
        torch.testing.assert_close(again.logits(data[0]), probe.logits(data[0]), rtol=1e-4, atol=1e-2)  # of up to 1000
    with (
        pytest.warns(UserWarning, match="has (another config|other weights)"),
        pytest.raises(ValueError, match="Wrong base for this HyperfeaturesHead"),
    ):
        Probe.from_pretrained(tmp_path / "probe", base=Denoiser.from_pipe(build("ddim")))
    shutil.rmtree(tmp_path / "probe" / "source")
    with pytest.raises(FileNotFoundError, match="on features of a Hyperfeatures, .* has no source/ .* pass it"):
        Probe.from_pretrained(tmp_path / "probe", base=source.denoiser)
    with pytest.raises(ValueError, match="timestep are settings of a model; Hyperfeatures has its own"):
        Probe.fit(source, data, timestep=3)
