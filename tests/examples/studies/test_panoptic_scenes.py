"""The study of open-vocabulary segments: its measures by hand, and a whole run with tiny networks."""

import json

import panoptic_scenes
import pytest
import torch
from panoptic_scenes import dealt, named, quality
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.data.scenes import COLOURS, HELD_OUT, KINDS, load_scenes
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.tasks import PanopticOutput
from tests.heads.odise_cases import save_clip, segmenter_of, tiny_head, tiny_towers
from tests.testers.models import saved

NAMES = ("red ring", "red cross", "blue ring", "ground")
TRUTH = PanopticMap(torch.tensor([[1, 1, 2, 2, 3, 3]]), {1: 0, 2: 2, 3: 3})
SAID = PanopticMap(torch.tensor([[1, 1, 2, 3, 3, 3]]), {1: 1, 2: 2, 3: 3})


def test_names_are_of_things_that_have_a_mask():
    output = PanopticOutput([SAID], [{}], [], NAMES)
    right = {"colour": 1.0, "kind": 0.0, "name": 0.0}
    assert named(output, [TRUTH], NAMES, {0}) == {"things": 1, "masks": 1.0, **right}
    assert named(output, [TRUTH], NAMES, {0, 2}) == {"things": 2, "masks": 0.5, **right}  # a half is no mask
    assert named(PanopticOutput([TRUTH], [{}], [], NAMES), [TRUTH], NAMES, {0, 2})["name"] == 1.0
    assert (quality([TRUTH], [TRUTH], 3, {0, 2}), quality([SAID], [TRUTH], 3, {0, 2})) == (1.0, 0.0)


def test_names_dealt_anew_leave_masks_and_the_ground():
    drawn = [dealt([TRUTH], 3, torch.Generator().manual_seed(seed))[0] for seed in range(200)]
    assert all(torch.equal(one.ids, TRUTH.ids) and one.classes[3] == 3 for one in drawn)
    shares = torch.tensor([one.classes[1] for one in drawn]).bincount(minlength=3) / 200
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.1)


@pytest.mark.slow
def test_a_run(tmp_path, monkeypatch):
    (tmp_path / "scenes/data").mkdir(parents=True)
    for split in ("test", "held_out"):
        load_scenes(split, 3).to_parquet(tmp_path / f"scenes/data/{split}-00000-of-00001.parquet")
    save_clip(tiny_towers(grow=4), tmp_path / "clip", mean=0.5)
    words = Vocabulary.of(
        [*(f"{c} {k}" for c in COLOURS for k in KINDS if (c, k) not in HELD_OUT), "ground"], ["ground"]
    )
    bases = []

    def quick(args, base, folder):
        denoiser, towers = Denoiser.from_pretrained(base), ImageTextEncoder.from_pretrained(args.clip)
        segmenter_of(tiny_head(denoiser, towers, strides=(2, 8)), denoiser, towers, words).save_pretrained(folder)
        recipe = json.loads((folder / "panoptic.json").read_text())
        (folder / "panoptic.json").write_text(
            json.dumps({**recipe, "protocol": {**recipe["protocol"], "steps": 1, "batch_size": 0}})
        )
        bases.append(denoiser)

    monkeypatch.setattr(panoptic_scenes, "train", quick)
    monkeypatch.setattr(panoptic_scenes, "DEALS", 2)
    places = {"model": saved("short_sd"), "clip": tmp_path / "clip", "dataset_name": tmp_path / "scenes"}
    flags = {**places, "work_dir": tmp_path / "work", "output_dir": tmp_path / "out", "images": 1}
    panoptic_scenes.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    one, two = (base.model.conv_in.weight for base in bases)
    assert one.shape == two.shape
    assert not torch.equal(one, two)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["images"], report["steps"], set(report["rows"])) == (1, 1, {"trained", "random"})
    new = report["rows"]["random"]["held_out"]["both"]["new"]
    assert 0 <= new["pq_chance"] <= 1
    assert new["things"] >= 1
    assert "new" not in report["rows"]["trained"]["test"]["both"]
    page = (tmp_path / "out/README.md").read_text()
    assert f"| never seen (`held_out`) | the same networks, random weights | {new['pq']:.3f} |" in page
    assert "1 steps of 0 images" in page
    with Image.open(tmp_path / "out/held_out.png") as drawn:
        assert drawn.width > 4 * 192
