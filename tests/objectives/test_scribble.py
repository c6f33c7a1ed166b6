"""Scribbles: partial cross-entropy in closed form, the pairwise regulariser by a plain loop, the contract."""

import json
import math
import shutil

import pytest
import torch

from diffusers_repr.objectives import ScribbleConfig, ScribbleObjective, SegmenterConfig
from diffusers_repr.objectives.scribble import pairwise_energy, partial_cross_entropy
from diffusers_repr.objectives.scribble.pairwise import at_scale
from diffusers_repr.testing import check_objective

NAMES = ["ground", "coin", "hole"]
NETWORK = {
    "model_type": "upernet", "hidden_size": 8, "pool_scales": [1], "use_auxiliary_head": False,
    "backbone_config": {"model_type": "convnext", "num_channels": 3, "patch_size": 2, "hidden_sizes": [4, 8],
                        "depths": [1, 1], "num_stages": 2, "out_features": ["stage1", "stage2"]},
}  # fmt: skip


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_partial_cross_entropy_is_of_the_labelled_pixels_alone():
    logits, masks = seeded(2, 3, 4, 5).float(), torch.full((2, 4, 5), 255)
    masks[0, 1, 2], masks[1, 3, 0], masks[1, 0, 0] = 2, 0, 1
    told = []
    for b, y, x in ((0, 1, 2), (1, 3, 0), (1, 0, 0)):
        row = logits[b, :, y, x].double()
        told.append(math.log(sum(math.exp(v) for v in row.tolist())) - float(row[masks[b, y, x]]))
    found = partial_cross_entropy(logits, masks)
    assert float(found) == pytest.approx(sum(told) / 3, rel=1e-5)
    moved = torch.where((masks == 255)[:, None], logits + 7 * seeded(2, 3, 4, 5, seed=1).float(), logits)
    assert torch.equal(partial_cross_entropy(moved, masks), found)
    whole = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        partial_cross_entropy(logits, whole), torch.nn.functional.cross_entropy(logits, whole), rtol=1e-6, atol=1e-6
    )
    free = logits.clone().requires_grad_()
    none = partial_cross_entropy(free, torch.full((2, 4, 5), 255))
    none.backward()
    assert (float(none), float(free.grad.abs().sum())) == (0, 0)  # and not NaN
    with pytest.raises(ValueError, match="one size"):
        partial_cross_entropy(logits, masks[:, :2])


def by_loops(shares, images, sigma_colour, sigma_place, radius):
    energies = []
    for probability, image in zip(shares, images, strict=True):
        _, height, width = image.shape
        places = [(y, x) for y in range(height) for x in range(width)]
        unlike = weights = 0.0
        for y, x in places:
            for v, u in places:
                if (y, x) == (v, u) or (radius and max(abs(y - v), abs(x - u)) > radius):
                    continue
                colour = float((127.5 * (image[:, y, x] - image[:, v, u])).square().sum())
                weight = math.exp(-colour / 2 / sigma_colour**2 - ((y - v) ** 2 + (x - u) ** 2) / 2 / sigma_place**2)
                unlike += weight * (1 - float(probability[:, y, x] @ probability[:, v, u]))
                weights += weight
        energies.append(unlike / weights)
    return sum(energies) / len(energies)


@pytest.mark.parametrize("radius", [None, 2, 9])
def test_pairwise_energy_is_that_of_a_plain_double_loop(radius):
    shares = seeded(2, 3, 4, 5).softmax(1).requires_grad_()
    images = (seeded(2, 3, 4, 5, seed=1) / 10).clamp(-1, 1)
    found = pairwise_energy(shares, images, sigma_colour=20, sigma_place=3, radius=radius)
    assert float(found) == pytest.approx(by_loops(shares.detach(), images, 20, 3, radius), rel=1e-9)
    (gradient,) = torch.autograd.grad(found, shares)
    step = 1e-6 * seeded(2, 3, 4, 5, seed=3)
    after = pairwise_energy(shares.detach() + step, images, sigma_colour=20, sigma_place=3, radius=radius)
    before = pairwise_energy(shares.detach() - step, images, sigma_colour=20, sigma_place=3, radius=radius)
    assert float((after - before) / 2) == pytest.approx(float((gradient * step).sum()), rel=1e-4)


def test_pairwise_energy_prefers_edges_where_colours_change(monkeypatch):
    images = torch.full((1, 3, 6, 6), -1.0)
    images[..., 3:] = 1.0
    at_edge, elsewhere = torch.zeros(1, 2, 6, 6), torch.zeros(1, 2, 6, 6)
    at_edge[:, 0, :, :3] = at_edge[:, 1, :, 3:] = 1
    elsewhere[:, 0, :, :1] = elsewhere[:, 1, :, 1:] = 1
    assert float(pairwise_energy(at_edge, images)) < 1e-6
    assert float(pairwise_energy(elsewhere, images)) > 0.1
    whole = pairwise_energy(elsewhere, images)
    monkeypatch.setattr("diffusers_repr.objectives.scribble.pairwise._PAIRS", 36 * 5)  # some rows at a time
    torch.testing.assert_close(pairwise_energy(elsewhere, images), whole)
    assert at_scale(images, 0.5).shape == (1, 3, 3, 3)
    for given in ({"sigma_place": 0}, {"radius": 0}):
        with pytest.raises(ValueError, match="positive"):
            pairwise_energy(at_edge, images, **given)
    with pytest.raises(ValueError, match="one size"):
        pairwise_energy(at_edge, images[..., :3])


def batch(**changes):
    masks = torch.full((3, 8, 8), 255)
    masks[:, 2, 2:6], masks[:, 6, :4] = 1, 0
    return {"pixel_values": seeded(3, 3, 8, 8).float().clamp(-1, 1), "masks": masks, **changes}


def objective(**changes):
    torch.manual_seed(0)
    config = ScribbleConfig(**changes)
    return ScribbleObjective(SegmenterConfig(NETWORK).build(NAMES), NAMES, config)


def test_contract_and_loss():
    made = objective(pairwise_weight=0.3)
    check_objective(made, batch())
    out = made.eval()(batch())
    terms = out["partial_cross_entropy"] + 0.3 * out["pairwise"]
    torch.testing.assert_close(out["loss"].detach(), terms)
    alone = objective(pairwise_weight=0).eval()(batch())
    assert "pairwise" not in alone
    assert made.network.config.id2label == dict(enumerate(NAMES))


def test_a_trained_segmenter_is_gone_on_from(tmp_path):
    torch.manual_seed(0)
    network = SegmenterConfig(NETWORK).build(NAMES).network
    network.save_pretrained(tmp_path / "one")
    planes = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "one" / "preprocessor_config.json").write_text(json.dumps(planes))
    start = SegmenterConfig(segmenter_name_or_path=str(tmp_path / "one"))
    same = start.build(NAMES)
    saved = network.state_dict()
    assert {k for k, v in same.network.state_dict().items() if not torch.equal(v, saved[k])} == set()
    assert (same.mean, same.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    more = start.build([*NAMES, "more"]).network
    drawn = {k for k, v in more.state_dict().items() if v.shape != saved[k].shape or not torch.equal(v, saved[k])}
    assert drawn == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert more.config.id2label[3] == "more"

    def refused(message, name, **changes):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        for file, given in changes.items():
            path = tmp_path / name / f"{file}.json"
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | given))
        with pytest.raises((ValueError, OSError), match=message):
            SegmenterConfig(segmenter_name_or_path=str(tmp_path / name)).build(NAMES)

    refused("are not those of its config: decode_head.* drawn anew", "wider", config={"hidden_size": 16})
    refused("'vit', no network of transformers that segments", "other", config={"model_type": "vit"})
    refused("holds an adapter", "adapter", adapter_config={"base_model_name_or_path": "user/other"})
    refused("sample_size|hidden_size is 1000000000", "huge", config={"hidden_size": 10**9})
    (tmp_path / "one" / "preprocessor_config.json").rename(tmp_path / "one" / "preprocessor.json")
    refused("preprocessor_config.json", "unknown")
    with pytest.raises(OSError, match="nowhere"):
        SegmenterConfig(segmenter_name_or_path=str(tmp_path / "nowhere")).build(NAMES)


def test_bad_scribbles_and_settings_are_refused():
    made = objective()
    wrong = batch()
    wrong["masks"][0, 0, 0] = 3
    for given, message in (
        (wrong, "class 3; classes are 0 to 2"), (batch(masks=torch.zeros(3, 4, 4)), "nearest pixel"),
        ({"pixel_values": batch()["pixel_values"]}, "--mask_column"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            made.check_batch(given)
    for given, message in (
        ({"pairwise_weight": -1}, "0 or more"), ({"sigma_place": 0}, "positive"), ({"pairwise_scale": 0}, r"\(0, 1\]"),
        ({"pairwise_radius": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ScribbleConfig(**given)
    for given, message in (
        ({}, "neither"), ({"segmenter": {"model_type": "bert"}}, "upernet"),
        ({"segmenter": NETWORK, "segmenter_name_or_path": "x"}, "both"),
        ({"segmenter": {**NETWORK, "widht": 3}}, "widht"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SegmenterConfig(**given)
    with pytest.raises(ValueError, match="two classes"):
        ScribbleObjective(made.segmenter, ["one"])
