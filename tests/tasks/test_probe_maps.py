"""Probes whose heads read maps: fitted on what is kept of them, saved, loaded, refused on another base."""

import json

import pytest
import torch

from diffusers_repr.features import FeatureExtractor
from diffusers_repr.heads import AttentionHead, FeedbackHead, fit_map_head
from diffusers_repr.tasks import Probe
from diffusers_repr.testing import check_task
from tests.tasks.planted import LAYERS, NAMES, images, pipeline

QUICK = {"layers": LAYERS, "timestep": [20, 60], "pooling": "map:4", "head_options": {"width": 16}}


def fitted(**changes):
    return Probe.fit(pipeline(), images(30), images(15, seed=1), head="attention", label_names=NAMES,
                     **{**QUICK, **changes})  # fmt: skip


def test_attention_on_maps_that_are_kept():
    """It learns; the task's contract holds; maps, levels and sizes are those that the head is given."""
    probe = fitted()
    assert type(probe.head) is AttentionHead
    assert probe.recipe.protocol["name"] == "adam-maps"
    assert (probe.recipe.pooling, probe.recipe.base.features) == ("map:4", {"mid_block": 16, "up_blocks.0": 16})
    assert probe.recipe.scores[0].value > 0.9
    check_task(probe, images(4, seed=5)[0], images(12, seed=2), lambda output: output.probabilities)
    pictures, _ = images(10)
    maps = FeatureExtractor(probe.denoiser, LAYERS, [20, 60], pooling=None)(pictures)  # the head pools them itself
    with torch.no_grad():
        wanted = probe.head({layer: maps[layer] for layer in LAYERS}).softmax(1)
    torch.testing.assert_close(probe(pictures).probabilities, wanted, rtol=1e-4, atol=1e-5)


def test_a_wrong_base_is_refused(tmp_path):
    probe = fitted(protocol="difformer")
    probe.save_pretrained(tmp_path / "probe")
    assert Probe.from_pretrained(tmp_path / "probe", base=pipeline()).head.config["levels"] == 2
    with pytest.raises(ValueError, match="gives 24 values at layer 'mid_block'; the probe was fitted on 16"):
        Probe.from_pretrained(tmp_path / "probe", base=pipeline(block_out_channels=(8, 24)))
    config = json.loads((tmp_path / "probe/config.json").read_text())
    for change, message in [({"levels": 1}, "reads 1 levels of"), ({"layers": ["mid_block", "other"]}, "describes 2")]:
        (tmp_path / "probe/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=f"{message}|damaged or do not fit"):
            Probe.from_pretrained(tmp_path / "probe", base=pipeline())


def test_a_probe_with_feedback_predicts(tmp_path):
    """Joined from parts, saved and loaded; its features are those of the second forward."""
    plain = fitted()
    pairs = FeedbackHead.options_for(plain.denoiser)
    channels, sizes = plain.head.config["channels"], plain.head.config["sizes"]
    torch.manual_seed(0)
    head = FeedbackHead(LAYERS, channels, sizes, 3, 2, width=16, **pairs)
    probe = Probe(head, plain.recipe, plain.denoiser)
    pictures, _ = images(5, seed=7)
    wanted = probe(pictures).probabilities
    probe.save_pretrained(tmp_path / "probe")
    assert torch.equal(Probe.from_pretrained(tmp_path / "probe", base=pipeline())(pictures).probabilities, wanted)
    for feeding in head.feeds:
        feeding.norm.weight.data.zero_()
    maps = FeatureExtractor(plain.denoiser, LAYERS, [20, 60])(pictures)
    with torch.no_grad():
        torch.testing.assert_close(probe.logits(pictures), head({layer: maps[layer] for layer in LAYERS}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "feedback"}, r"needs the network in every step: train it by examples/train_probe.py"),
        ({"pooling": "mean"}, "leaves vectors, and 'attention' reads maps; take 'map:P'"),
        ({"head": "linear"}, "pooling='map:4' leaves maps; choose 'mean'"),
        ({"protocol": "lbfgs"}, "fits heads linear, not 'attention'; for 'attention' use ddae or adam-maps"),
        ({"protocol": "difformer@2"}, "'difformer' is version 1 here, and 'difformer@2' was asked for"),
        ({"head_options": {"depth": 3}}, "AttentionHead has no option 'depth'; it has width"),
    ],
)
def test_what_is_refused_before_a_forward(settings, message):
    with pytest.raises(ValueError, match=message):
        Probe.fit(pipeline(), images(6), **{"head": "attention", **QUICK, **settings})


def test_labels_that_cannot_be_learned():
    pictures, _ = images(6)
    for found, message in [([1] * 6, "All 6 training labels are 1"), ([0, 1, 2, 0, 1, 9], "run from 0 to 9; class")]:
        with pytest.raises(ValueError, match=message):
            Probe.fit(pipeline(), (pictures, found), head="attention", label_names=NAMES, **QUICK)
    with pytest.warns(UserWarning, match="right: 1 of 3 classes have no image in images"):
        Probe.fit(pipeline(), (pictures, [0, 1, 0, 1, 0, 1]), layers="mid_block", timestep=50, protocol="ridge",
                  label_names=NAMES)  # fmt: skip
    maps = torch.randn(6, 4, 2, 2)
    for given, message in [
        ({"a": maps[:, :, 0]}, r"must be \(N, C, h, w\)"),
        ({"a": maps[:5]}, "must be 5 class ids"),
        ({"a": torch.full_like(maps, float("nan"))}, "not all finite"),
        ({}, "no training maps"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_map_head(given, torch.arange(6) % 2, width=8)
