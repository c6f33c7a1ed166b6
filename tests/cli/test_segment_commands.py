"""`diffusers-repr segment fit`, `segment predict` and `segment open`, in this process."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.cli.push import what_is
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.tasks import OpenVocabularySegmenter, Segmenter
from tests.heads.odise_cases import save_clip, segmenter_of, tiny_head, tiny_towers
from tests.tasks.planted import pipeline
from tests.tasks.planted_masks import CLASSES, annotated
from tests.testers.models import build

QUICK = ["--layers", "mid_block", "up_blocks.1", "--timesteps", "10", "100", "--members", "2", "--max_epochs", "1"]


def write(folder, rows, seed):
    """A split as a folder of images with a metadata.jsonl."""
    folder.mkdir(parents=True)
    lines = []
    for at, (image, mask) in enumerate(zip(*annotated(rows, seed), strict=True)):
        image.save(folder / f"{at}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"mask{at}.png")
        lines.append(json.dumps({"file_name": f"{at}.png", "mask_file_name": f"mask{at}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a data set of two splits, and a segmenter fitted by the command."""
    folder = tmp_path_factory.mktemp("place")
    pipeline().save_pretrained(folder / "model")
    write(folder / "data" / "train", 4, 0)
    write(folder / "data" / "test", 2, 1)
    assert main(fit(folder, folder / "pixels")) == 0
    return folder


def fit(place, out, *more):
    data = [str(place / "model"), str(place / "data"), "--out", str(out), "--mask_names", *CLASSES, "--quiet"]
    return ["segment", "fit", *data, *QUICK, *more]


def test_fit_measures_and_saves(place, capsys):
    recipe = json.loads((place / "pixels" / "segmentation.json").read_text())
    assert recipe["label_names"] == CLASSES
    assert recipe["layers"] == ["mid_block", "up_blocks.1"]
    assert {(s["split"], s["name"]) for s in recipe["scores"]} >= {("test", "mean_iou"), ("test", "pixel_accuracy")}
    assert recipe["base"]["name"] == "../model"
    assert (place / "pixels" / "recipe.yaml").is_file()
    assert what_is(str(place / "pixels")) == ("segmenter", "model")
    sent = [file.path for file in plan_upload(place / "pixels").files]
    assert "segmentation.json" in sent
    assert "recipe.yaml" not in sent
    assert main(fit(place, place / "pixels", "--seed", "3")) == 2
    assert "seed: not given -> 3" in capsys.readouterr().err
    assert main(["push", str(place / "pixels"), "user/name", "--base", "user/base", "--dry_run"]) == 0
    assert "segmentation.json" in capsys.readouterr().out


def test_predict_writes_masks_that_are_those_of_python(place, tmp_path, capsys):
    images = place / "data" / "test"
    command = ["segment", "predict", str(place / "pixels"), str(images / "0.png"), str(images / "1.png")]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()] == rows
    output = Segmenter.from_pretrained(place / "pixels")([Image.open(images / f"{at}.png") for at in range(2)])
    for at, row in enumerate(rows):
        with (
            Image.open(tmp_path / "out" / row["mask"]) as mask,
            Image.open(tmp_path / "out" / row["picture"]) as shown,
        ):
            assert np.array_equal(np.array(mask), output.masks[at].numpy())
            assert mask.mode == "P"
            assert shown.width > 3 * 100
        share = {name: float((output.masks[at] == i).float().mean()) for i, name in enumerate(CLASSES)}
        assert row["classes"] == pytest.approx(share, abs=1e-4)
        assert row["uncertainty"] == pytest.approx(float(output.scores[at]), abs=1e-4)
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    same = [str(images / "0.png")] * 2
    assert main(["segment", "predict", str(place / "pixels"), *same, "--out", str(tmp_path / "twice")]) == 0
    assert sorted(p.name for p in (tmp_path / "twice" / "masks").iterdir()) == ["0-2.png", "0.png"]


def test_wrong_use(place, tmp_path, capsys):
    cases = [
        (fit(place, tmp_path / "a", "--mask_column", "regions"), "has no column 'regions'"),
        (fit(place, tmp_path / "a", "--preset", "nothing"), "No preset for method 'nothing'"),
        (fit(place, tmp_path / "a", "--max_epochs", "0"), "--max_epochs must be at least 1"),
        (fit(place, tmp_path / "a", "--mask_names", "a", "b"), "has the class 2 at"),
        (["segment", "predict", str(place / "model"), "x.png", "--out", str(tmp_path / "a")], "No file or folder"),
        (
            ["segment", "predict", str(place / "model"), str(place / "data"), "--out", str(tmp_path / "a")],
            "is no segmenter: it has no segmentation.json; it is a pipeline",
        ),
    ]
    for words, told in cases:
        assert main(words) == 2
        assert told in capsys.readouterr().err, words
    with pytest.raises(SystemExit) as stopped:
        main(["segment"])
    assert stopped.value.code == 2
    assert "segment fit" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text-to-image model, a CLIP, a segmenter on both, and two images."""
    folder = tmp_path_factory.mktemp("words")
    build("sd").save_pretrained(folder / "model")
    save_clip(tiny_towers(grow=4), folder / "clip")
    base, towers = Denoiser.from_pretrained(folder / "model"), ImageTextEncoder.from_pretrained(folder / "clip")
    segmenter_of(tiny_head(base, towers), base, towers).save_pretrained(folder / "mine")
    (folder / "images").mkdir()
    for at, size in enumerate([(32, 40), (33, 32)]):
        pixels = np.random.default_rng(at).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{at}.png")
    return folder


def test_open_names_segments_as_python_does(words, tmp_path, capsys):
    command = ["segment", "open", str(words / "mine"), str(words / "images"), "--out", str(tmp_path / "out")]
    named = ["--vocabulary", "dog, puppy", "rain", "--stuff", "rain", "--overlap", "0.1", "--weights", "0", "0"]
    assert main([*command, *named, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in (tmp_path / "out/segments.jsonl").read_text().splitlines()] == rows
    task = OpenVocabularySegmenter.from_pretrained(words / "mine", weights=(0, 0))
    images = [Image.open(words / "images" / f"{at}.png") for at in range(2)]
    output = task(images, Vocabulary.of(["dog, puppy", "rain"], ["rain"]), overlap=0.1)
    for at, row in enumerate(rows):
        assert row["image"].endswith(f"{at}.png")
        found = sorted((one["name"], one["score"], one["pixels"]) for one in row["segments"])
        assert found == sorted((name, round(score, 4), pixels) for name, score, pixels in output.segments(at))
        with Image.open(tmp_path / "out" / row["mask"]) as mask:
            assert np.array_equal(np.array(mask), output.maps[at].ids.numpy())
        with Image.open(tmp_path / "out" / row["picture"]) as shown:
            assert shown.width >= 320
    assert any(row["segments"] for row in rows)
    pushed = ["push", str(words / "mine"), "user/name", "--base", "user/base", "--clip", "user/clip", "--dry_run"]
    assert main(pushed) == 0
    assert "panoptic.json" in capsys.readouterr().out
    assert main([*command, "--limit", "1", "--overwrite"]) == 0  # the names it was trained on
    told = capsys.readouterr().out
    assert "images/0.png  " in told
    assert "images/1.png" not in told


def test_wrong_use_of_open(words, place, tmp_path, capsys):
    start = ["segment", "open", str(words / "mine"), str(words / "images"), "--out", str(tmp_path / "a")]
    cases = [
        ([*start, "--vocabulary", "cat", "dog, Cat"], "'Cat' of class 1 ('dog') is a name of class 0 ('cat') too"),
        ([*start, "--vocabulary", "cat,"], "it needs a name"),
        ([*start, "--stuff", "cat"], "give --vocabulary, too"),
        ([*start, "--vocabulary", "cat", "--stuff", "sky"], "'sky', which is no class"),
        ([*start, "--vocabulary", "cat", "--weights", "2", "0"], "two numbers in [0, 1]"),
        ([*start, "--base", str(place / "model")], "UNet2DConditionModel"),
        ([*start, "--clip", str(words / "gone")], "gone"),
        (["segment", "open", str(place / "pixels"), *start[3:]], "is no open-vocabulary segmenter"),
        (["segment", "predict", str(words / "mine"), *start[3:]], "it is an open-vocabulary segmenter"),
    ]
    for given, told in cases:
        assert main(given) == 2, given
        assert told in capsys.readouterr().err, given
    assert not (tmp_path / "a").exists()
