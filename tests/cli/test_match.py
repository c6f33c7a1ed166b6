"""`diffusers-repr match`: what it prints, what it leaves in the folder, what it refuses before a model is loaded."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.sweep import select_features
from diffusers_repr.tasks.correspondence import Correspondence
from tests.tasks.correspondence_cases import photo, shifted
from tests.tasks.planted import pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("match")
    pipeline(in_channels=3, out_channels=3).save_pretrained(folder / "model")
    photo().save(folder / "a.png")
    shifted(photo(), 4, 0).save(folder / "b.png")
    return folder


def call(place, *more, points=("9", "9", "33", "25"), out="out"):
    images = [str(place / name) for name in ("a.png", "b.png")]
    where = ["--model", str(place / "model"), "--out", str(place / out), "--quiet", "--image_size", "40", "56"]
    return ["match", *images, *where, *(("--points", *points) if points else ()), *more]


SET = ("--layer", "up_blocks.0", "--timesteps", "50", "--ensemble_size", "2")


def test_points_to_json_and_a_picture(place, capsys):
    assert main(call(place, *SET, "--similarity", "--homography", "lmeds", "--json")) == 0
    told = capsys.readouterr()
    assert "layer up_blocks.0 at timestep 50, ensemble of 2" in told.err
    values = json.loads(told.out)
    assert values == json.loads((place / "out" / "matches.json").read_text())
    assert values["homography"] == {"method": "lmeds", "matrix": None, "inliers": 0}  # of two points there is none
    source = FeatureExtractor(
        Denoiser.from_pretrained(place / "model"), "up_blocks.0", 50, ensemble_size=2, image_size=(40, 56)
    )
    want = Correspondence(source)(photo(), shifted(photo(), 4, 0), [[9, 9], [33, 25]])
    assert [row["target"] for row in values["matches"]] == want.matches.tolist()
    with Image.open(place / "out" / "matches.png") as picture:
        assert picture.size[1] > 360
        assert np.asarray(picture).std() > 1
    assert main(call(place, *SET, "--similarity", "--homography", "lmeds")) == 0  # the same again
    assert "33.0" in capsys.readouterr().out
    assert main(call(place, "--layer", "mid_block", "--timesteps", "50")) == 2
    assert "of another recipe" in capsys.readouterr().err


def test_cells_that_choose_each_other_and_a_selection(place, capsys):
    pairs = [(photo(), shifted(photo(), 4, 0), [[9, 9]], [[13, 9]], (0, 0, 30, 30))]
    denoiser = Denoiser.from_pretrained(place / "model")
    found = select_features(denoiser, pairs, None, [50], metric="pck", seeds=(0,), image_size=(40, 56), progress=False)
    found.save(place / "selection", heatmap=False)
    chosen = ["--selection", str(place / "selection")]
    assert main(call(place, *chosen, "--homography", "ransac", points=(), out="cells")) == 0
    assert f"layer {found.best.layer} at timestep 50" in capsys.readouterr().out
    assert len(json.loads((place / "cells" / "matches.json").read_text())["matches"]) > 4


@pytest.mark.parametrize(
    ("more", "points", "message"),
    [
        (SET, ("9", "45"), r"--points: number 0 is (x, y) = (9, 45), outside of the image of 56 x 40"),
        (SET, ("9",), "--points takes pairs x y; got 1 numbers"),
        (("--timesteps", "1", "2"), ("9", "9"), "--timesteps takes one level here; got 2"),
        (("--selection", "x", "--layer", "y"), ("9", "9"), "--selection has its own layer"),
        ((*SET, "--model", "no/such/model/at/all"), ("9", "9"), "no/such/model"),
        (("--preset", "dift"), ("9", "9"), "'dift' has published choices for sd, adm-256"),
        ((*SET, "--category", "cat"), ("9", "9"), "--category cat has no place: the prompt is None. Pass --prompt"),
        ((*SET, "--category", "cat", "--prompt", "a dog"), ("9", "9"), "--category cat has no place in --prompt"),
        (("--preset", "dino"), ("9", "9"), "No preset for method 'dino'"),
    ],
)
def test_wrong_use(place, capsys, more, points, message):
    assert main(call(place, *more, points=points, out="new")) == 2
    assert message in capsys.readouterr().err
    assert not (place / "new" / "matches.json").exists()


def test_a_file_that_is_no_image(place, capsys):
    (place / "text.png").write_text("no image")
    for name, message in (("text.png", "it is no image"), ("gone.png", "No file")):
        assert main(["match", str(place / name), str(place / "b.png"), "--model", "m", "--out", str(place / "x")]) == 2
        assert message in capsys.readouterr().err


def test_selection_by_pck_is_not_a_command_of_labelled_images(place, capsys):
    assert main(["select", "m", "d", "--timesteps", "5", "--metric", "pck", "--out", str(place / "none")]) == 2
    assert "measured on pairs of images with points" in capsys.readouterr().err
