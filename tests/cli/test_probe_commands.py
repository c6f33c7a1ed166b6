"""`diffusers-repr probe`, `predict` and `push`, in this process; one run as a command of its own."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.cli.predict import find_images
from diffusers_repr.cli.push import what_is
from tests.tasks.planted import NAMES, dataset, images, pipeline
from tests.testers.hub_server import hub_env


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a data set of three splits, images, and a probe fitted by the command."""
    folder = tmp_path_factory.mktemp("place")
    pipeline().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for seed, (split, rows) in enumerate({"train": 60, "validation": 30, "test": 45}.items()):
        dataset(rows, seed).to_parquet(folder / "data" / f"{split}.parquet")
    for label, picture in enumerate(images(3, seed=9)[0]):
        (folder / "images" / NAMES[label]).mkdir(parents=True)
        picture.save(folder / "images" / NAMES[label] / "one.png")
    settings = ["--layers", "mid_block", "up_blocks.0", "--timestep", "50", "--pooling", "adaptive:2", "--quiet"]
    assert main(["probe", str(folder / "model"), str(folder / "data"), "--out", str(folder / "probe"), *settings]) == 0
    return folder


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_probe_has_its_scores_and_names(place):
    recipe = json.loads((place / "probe" / "probe.json").read_text())
    assert recipe["label_names"] == NAMES
    assert recipe["layers"] == ["mid_block", "up_blocks.0"]
    scores = {(s["split"], s["name"]): s["value"] for s in recipe["scores"]}
    assert set(scores) == {("validation", "accuracy"), ("test", "accuracy"), ("test", "balanced_accuracy")}
    assert scores["test", "accuracy"] > 0.9
    assert "Accuracy" in (place / "probe" / "README.md").read_text()


def test_predict_prints_a_table_and_json(place, capsys):
    assert main(["predict", str(place / "probe"), str(place / "images"), "--top", "2"]) == 0
    table = lines(capsys)
    assert len(table) == 3
    for name, line in zip(NAMES, table, strict=True):
        path, first, value, *_ = line.split()
        assert (path.split("/")[-2], first) == (name, name)
        assert 0.3 < float(value) <= 1
    one = str(place / "images" / "left" / "one.png")
    assert main(["predict", str(place / "probe"), one, "--json"]) == 0
    (found,) = map(json.loads, lines(capsys))
    assert found["image"] == one
    assert found["label"] == "left" == found["top"][0]["label"]
    assert sum(entry["probability"] for entry in found["top"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow  # a process of its own; `tests/features/test_cli_extract.py` has one that stays
def test_predict_as_a_command_of_its_own(place, tmp_path):
    arguments = ["predict", str(place / "probe"), str(place / "images"), "--json", "--base", str(place / "model")]
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_repr", *arguments],
        env=hub_env("http://127.0.0.1:9", tmp_path, token=None),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == NAMES


@pytest.mark.parametrize("options", [["--head", "knn"], ["--head", "mlp"], ["--protocol", "ddae", "--seed", "3"]])
def test_heads_and_protocols(place, options, tmp_path, capsys):
    arguments = ["probe", str(place / "model"), str(place / "data" / "train.parquet"), "--out", str(tmp_path / "p")]
    assert main([*arguments, "--layers", "mid_block", "--timestep", "10", "300", *options, "--quiet"]) == 0
    assert "timesteps=[10, 300]" in lines(capsys)[0]
    recipe = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert recipe["protocol"]["name"] == {"knn": "knn", "mlp": "adam", "ddae": "ddae"}[options[1]]
    assert recipe["scores"] == []  # one file: no other splits


def test_a_selection_is_taken(place, tmp_path, capsys):
    select = ["select", str(place / "model"), str(place / "data"), "--timesteps", "50", "400", "--seeds", "0"]
    layers = ["--layers", "mid_block", "up_blocks.0", "--max_layers", "1", "--max_levels", "1", "--no_heatmap"]
    assert main([*select, *layers, "--out", str(tmp_path / "selection"), "--quiet"]) == 0
    best = json.loads((tmp_path / "selection" / "selection.json").read_text())["best"]
    common = ["probe", str(place / "model"), str(place / "data"), "--out", str(tmp_path / "probe"), "--quiet"]
    assert main([*common, "--selection", str(tmp_path / "selection")]) == 0
    recipe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert recipe["layers"] == [best["layer"]]
    assert recipe["levels"][0]["timestep"] == best["timestep"]
    assert main([*common, "--selection", str(tmp_path / "selection"), "--timestep", "3"]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The probe's base is .*which is not on the Hub")
def test_wrong_use(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "p"), "--quiet"]
    model, data, probe = str(place / "model"), str(place / "data"), str(place / "probe")
    image = str(place / "images")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    cases = [
        (["probe", model, data, *out], "Give --layers and --timestep, or --selection"),
        (["probe", model, data, "--layers", "mid_block", *out], "Give both --layers and --timestep"),
        (["probe", model, data, "--layers", "mid", "--timestep", "1", *out], "No layer 'mid'"),
        (["probe", model, data, "--layers", "mid_block", "--timestep", "5000", *out], "5000"),
        (["probe", model, data, "--layers", "m", "--timestep", "1", "--protocol", "x", *out], "Unknown protocol 'x'"),
        (["probe", model, image + "/x", "--layers", "mid_block", "--timestep", "1", *out], "/x"),
        (["probe", probe, data, "--layers", "mid_block", "--timestep", "1", *out], "is no pipeline folder"),
        (["predict", model, image], "has no probe.json; it is a pipeline"),
        (["predict", probe, str(tmp_path / "none.png")], "No file or folder"),
        (["predict", probe, str(tmp_path / "nothing")], "No image in the folder"),
        (["predict", probe, str(tmp_path / "text.png")], "text.png) cannot be read: it is no image"),
        (["predict", probe, image, "--top", "0"], "--top must be at least 1"),
        (["predict", probe, image, "--base", probe], "is no pipeline folder"),
        (["push", str(tmp_path / "nothing"), "user/x"], "Cannot tell what"),
        (["push", probe + "/probe.json", "user/x"], "is a file"),
        (["push", str(tmp_path / "store"), "user/x"], "manifest"),
        (["push", str(tmp_path / "none"), "user/x"], "There is no folder"),
        (["push", probe, "user/x", "--repo_type", "dataset"], "is a probe, which goes to a model repository"),
        (["push", model, "user/x", "--base", "user/y"], "--base is for probes"),
        (["push", probe, "no id"], "is no repository id"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"diffusers-repr {arguments[0]}: "), told
        assert message in told, (arguments, told)
    assert not (tmp_path / "p").exists()


def test_push_tells_folders_apart(tmp_path, place):
    assert what_is(str(place / "probe")) == ("probe", "model")
    assert what_is(str(place / "model")) == ("pipeline", "model")
    for name, kind in {
        "manifest.json": ("store of features", "dataset"),
        "pipeline.py": ("custom pipeline", "model"),
    }.items():
        (tmp_path / name).write_text("{}")
        assert what_is(str(tmp_path)) == kind
        (tmp_path / name).unlink()


def test_images_are_found_in_order_and_in_all_depths(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([str(tmp_path), str(tmp_path / "notes.txt")])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["a.webp", "b/1.jpg", "b/2.PNG", "notes.txt"]


def test_turned_photographs_are_turned_back(place, tmp_path, capsys):
    picture = Image.open(place / "images" / "left" / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    picture.rotate(180).save(tmp_path / "turned.png", exif=exif)
    assert main(["predict", str(place / "probe"), str(tmp_path / "turned.png"), "--json"]) == 0
    assert json.loads(lines(capsys)[-1])["label"] == "left"
