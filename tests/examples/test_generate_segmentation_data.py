"""Generated images with masks: which are kept, and that others can learn from them."""

import json

import generate_segmentation_data
import numpy as np
import pytest

from diffusers_repr.data.image_data import load_images
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.tasks import Segmenter
from tests.examples.scripts import run_script
from tests.tasks.planted import pipeline
from tests.tasks.planted_masks import CLASSES, QUICK, small


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    pipeline().save_pretrained(folder / "model")
    small(Denoiser.from_pretrained(folder / "model")).save_pretrained(folder / "segmenter")
    return folder


def generate(place, out, *more):
    flags = ["--num_samples", "6", "--num_inference_steps", "2", "--batch_size", "4", "--out", str(out), *more]
    model, segmenter = str(place / "model"), str(place / "segmenter")
    return run_script(generate_segmentation_data.main, "generate_segmentation_data", model, segmenter, *flags)


def test_the_certain_ones_are_kept_and_can_be_learned_from(place, tmp_path):
    told = generate(place, tmp_path / "out", "--drop", "0.34")
    assert "kept 4 of 6 images (--cut certain)" in told
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    order = sorted(rows, key=lambda row: row["uncertainty"])
    assert [row["name"] for row in rows] == [f"{n:06d}" for n in range(6)]
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == [f"{row['name']}.png" for row in order[:4]]
    data = load_images(str(tmp_path / "out"), mask_column="mask", mask_names=CLASSES)
    assert len(data) == 4
    segmenter = Segmenter.from_pretrained(place / "segmenter")
    for sample in data.samples(range(4)):
        assert np.array_equal(segmenter(sample.image).masks[0].numpy(), sample.mask)
    quick = {"members": 2, "protocol": QUICK.replace(max_epochs=1)}
    assert Segmenter.fit(pipeline(), data, layers="up_blocks.1", timestep=10, **quick).recipe.train["rows"] == 4


def test_it_goes_on_where_it_was_stopped(place, tmp_path):
    whole = generate(place, tmp_path / "whole")
    assert "4 of 6 images\n6 of 6 images\n" in whole
    generate(place, tmp_path / "parts", "--num_samples", "4")
    assert generate(place, tmp_path / "parts").splitlines()[0] == "6 of 6 images"
    for file in ("scores.jsonl", "train/metadata.jsonl"):
        assert (tmp_path / "parts" / file).read_text() == (tmp_path / "whole" / file).read_text()
    with pytest.raises(ValueError, match="the paper's cut is empty unless more than 30 are dropped"):
        generate(place, tmp_path / "whole", "--cut", "paper", "--drop", "0.5")
    with pytest.raises(ValueError, match="--drop is a share"):
        generate(place, tmp_path / "whole", "--drop", "1")
