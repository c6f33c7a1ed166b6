"""`diffusers-repr segment fit` and `segment predict`, in this process."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.cli.push import what_is
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.tasks import Segmenter
from tests.tasks.planted import pipeline
from tests.tasks.planted_masks import CLASSES, annotated

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
