"""`diffusers-repr probe`, `predict` and `push`, in this process; one run as a command of its own."""

import dataclasses
import json
import re
import subprocess
import sys
import types
from typing import get_args, get_type_hints

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusers_repr.cli import COMMANDS, command_module, main, read_settings
from diffusers_repr.cli.push import what_is
from diffusers_repr.cli.saved_task import find_images
from diffusers_repr.data.image_data import load_images
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.sweep import Selection, hold_out
from diffusers_repr.sweep.splits import draw_rows
from diffusers_repr.tasks import Probe, ProbeRecipe
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
    settings = ["--layers", "mid_block", "up_blocks.0", "--timesteps", "50", "--pooling", "adaptive:2", "--quiet"]
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
    assert main([*arguments, "--layers", "mid_block", "--timesteps", "10", "300", *options, "--quiet"]) == 0
    assert any("timesteps=[10, 300]" in line for line in lines(capsys))
    recipe = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert recipe["protocol"]["name"] == {"knn": "knn", "mlp": "adam", "ddae": "ddae"}[options[1]]
    held = "train, 0.2 held out by seed 0"  # one file: no other splits
    assert {(s["split"], s["rows"]) for s in recipe["scores"]} == {(held, 12)}


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
    assert main([*common, "--selection", str(tmp_path / "selection"), "--timesteps", "3", "--overwrite"]) == 2
    assert "not both" in capsys.readouterr().err


def pets(folder, count=20):
    """A folder of two classes of images, nothing else."""
    for name, picture in zip(("left", "right"), (0, 1), strict=True):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images(3 * count, seed=4)[0][picture::3]):
            image.save(folder / name / f"{i}.png")
    return str(folder)


def test_a_folder_of_classes_alone_gets_a_score(place, tmp_path, capsys):
    """A fifth of each class is held out, the same by each command; recipe, card and output tell it."""
    data, out = pets(tmp_path / "pets"), str(tmp_path / "probe")
    reads = ["--layers", "mid_block", "--timesteps", "50", "--pooling", "adaptive:2", "--quiet"]
    assert main(["probe", str(place / "model"), data, *reads, "--out", out, "--json"]) == 0
    told = capsys.readouterr()
    assert f"{data} has one split: held out 8 of 40 images to measure on (--test_fraction 0.2)." in told.err
    (found,) = map(json.loads, told.out.splitlines())
    assert (found["layers"], found["timesteps"], found["label_names"]) == (["mid_block"], [50], ["left", "right"])
    recipe = ProbeRecipe.from_dict(json.loads((tmp_path / "probe" / "probe.json").read_text()))
    assert [dataclasses.asdict(score) for score in recipe.scores] == found["scores"]
    assert recipe.train["split"] == "train without 0.2 held out by seed 0"
    assert {(s.name, s.split, s.rows) for s in recipe.scores} == {
        (name, "train, 0.2 held out by seed 0", 8) for name in ("accuracy", "balanced_accuracy")
    }
    rest, held = hold_out(load_images(data), 0.2, 0)
    assert np.bincount(held.labels()).tolist() == [4, 4]
    probe = Probe.from_pretrained(out)
    assert probe.evaluate(held, record=False)["accuracy"] == pytest.approx(recipe.scores[0].value)
    assert "train, 0.2 held out by seed 0" in (tmp_path / "probe" / "README.md").read_text()
    # `select` works on what is left
    select = ["select", str(place / "model"), data, "--timesteps", "50", "--seeds", "0", "--out", str(tmp_path / "s")]
    assert main([*select, *reads[:2], "--no_heatmap", "--quiet", "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    selection = Selection.load(tmp_path / "s")
    assert selection.recipe["train"]["rows"] + selection.recipe["validation"]["rows"] == len(rest) == 32
    assert found["best"]["layer"] == selection.best.layer == "mid_block"
    assert found["best"]["mean"] == selection.best.mean


def test_what_was_selected_by_is_not_measured_on(place, tmp_path, capsys):
    """A validation split by another name: the probe takes the selection's, so that both see the same parts."""
    data = tmp_path / "data"
    data.mkdir()
    for seed, (split, rows) in enumerate({"train": 40, "dev": 20}.items()):
        dataset(rows, seed).to_parquet(data / f"{split}.parquet")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "  - {split: dev, path: dev.parquet}\n---\n"
    )
    reads = ["--layers", "mid_block", "--timesteps", "50", "--seeds", "0", "--max_layers", "1", "--no_heatmap"]
    select = ["select", str(place / "model"), str(data), *reads, "--quiet", "--out", str(tmp_path / "selection")]
    assert main([*select, "--validation_split", "dev"]) == 0
    assert Selection.load(tmp_path / "selection").recipe["train"]["rows"] == 40
    probe = ["probe", str(place / "model"), str(data), "--selection", str(tmp_path / "selection"), "--quiet"]
    capsys.readouterr()
    assert main([*probe, "--out", str(tmp_path / "probe")]) == 0
    assert "validation split: dev, as that of the selection" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert recipe["train"]["rows"] == 40
    assert {(s["split"], s["rows"]) for s in recipe["scores"]} == {("dev", 20)}
    assert main([*probe, "--out", str(tmp_path / "other"), "--test_split", "dev"]) == 2
    assert f"would be measured on {data} (dev), of which `select` has seen images" in capsys.readouterr().err
    (tmp_path / "selection" / "recipe.yaml").unlink()  # as one that Python saved
    assert main([*probe, "--out", str(tmp_path / "other")]) == 2
    assert "(train, 0.2 held out by seed 0), of which `select` has seen images" in capsys.readouterr().err
    assert main([*probe, "--out", str(tmp_path / "other"), "--test_fraction", "0"]) == 0
    one = [*select[:2], str(data / "train.parquet"), *select[3:-1], str(tmp_path / "s")]
    assert main(one) == 0
    probe[2], probe[4] = str(data / "train.parquet"), str(tmp_path / "s")
    capsys.readouterr()
    assert main([*probe, "--out", str(tmp_path / "third"), "--split_seed", "1"]) == 2
    assert "--split_seed of `select`" in capsys.readouterr().err


def test_data_are_checked_before_a_model_is_loaded(place, tmp_path, monkeypatch, capsys):
    def load(*given, **named):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Denoiser, "from_pretrained", load)
    rows = dataset(20).remove_columns("label").add_column("label", [0, 2_000_000] * 10)
    (tmp_path / "sparse").mkdir()
    rows.to_parquet(tmp_path / "sparse" / "train.parquet")
    rows = rows.remove_columns("label").add_column("label", [0, None] * 10)
    (tmp_path / "missing").mkdir()
    rows.to_parquet(tmp_path / "missing" / "train.parquet")
    sparse, missing = (str(tmp_path / name) for name in ("sparse", "missing"))
    model, out = str(place / "model"), ["--out", str(tmp_path / "out")]
    reads = ["--layers", "mid_block", "--timesteps", "50"]
    probes = ["align", model, "encoder", sparse, "--metric", "linear", "--test_split", "train", "--no_plot"]
    for words, message in (
        (["probe", model, sparse, *reads], "2000001 classes, of which 1999999 were empty"),
        (["select", model, sparse, "--timesteps", "50", "--no_heatmap"], "1999999 were empty"),
        (["extract", model, missing, *reads], "Row 1 of .* has no label"),
        ([*probes[:3], missing, *probes[4:]], "Row 1 of .* has no label"),
    ):
        assert main([*words, *out]) == 2, words
        assert re.search(message, capsys.readouterr().err), words


def test_images_that_keep_a_far_larger_size_are_told(place, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("L", (48, 48)).save(tmp_path / "photos" / "one.png")
    command = ["extract", str(place / "model"), str(tmp_path / "photos"), "--layers", "mid_block", "--timesteps", "50"]
    with pytest.warns(
        UserWarning, match=r"48 x 48 \(.*9 times the pixels of the 16 x 16 that UNet2DModel was made for"
    ):
        assert main([*command, "--quiet", "--image_size", "keep", "--out", str(tmp_path / "kept")]) == 0
    assert main([*command, "--quiet", "--out", str(tmp_path / "own")]) == 0  # a warning would be an error
    assert main([*command, "--quiet", "--image_size", "48", "--out", str(tmp_path / "asked")]) == 0


def test_a_quick_try(place, tmp_path, capsys):
    data = pets(tmp_path / "pets")
    reads = ["--layers", "mid_block", "--timesteps", "50", "--quiet", "--limit", "10", "--test_fraction", "0.4"]
    assert main(["probe", str(place / "model"), data, *reads, "--out", str(tmp_path / "probe")]) == 0
    assert "held out 16 of 40 images" in capsys.readouterr().out  # the same ones, whatever the limit
    recipe = json.loads((tmp_path / "probe" / "probe.json").read_text())
    split = "train without 0.4 held out by seed 0, 10 drawn by seed 0"
    assert (recipe["train"]["rows"], recipe["train"]["split"]) == (10, split)
    assert {(s["rows"], s["split"]) for s in recipe["scores"]} == {
        (10, "train, 0.4 held out by seed 0, 10 drawn by seed 0")
    }
    few = draw_rows(load_images(data), 10)
    assert np.bincount(few.labels()).tolist() == [5, 5]  # though a folder is in the order of its classes
    assert main(["predict", str(tmp_path / "probe"), data, "--limit", "3", "--json"]) == 0
    assert len(lines(capsys)) == 3
    assert main(["predict", str(tmp_path / "probe"), data, "--limit", "0"]) == 2
    assert "--limit is a number of images, at least 1; got 0" in capsys.readouterr().err


def test_another_recipe_is_not_overwritten(place, tmp_path, capsys):
    out = tmp_path / "probe"
    short = ["--out", str(out), "--quiet", "--protocol", "ridge", "--limit", "12"]
    command = ["probe", str(place / "model"), str(place / "data"), *short, "--layers"]
    assert main([*command, "mid_block", "--timesteps", "50"]) == 0
    assert main([*command, "mid_block", "--timesteps", "50", "--batch_size", "7"]) == 0  # the same again
    first = (out / "probe.json").read_bytes()
    capsys.readouterr()
    assert main([*command, "mid_block", "up_blocks.0", "--timesteps", "50", "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert 'layers: ["mid_block"] -> ["mid_block", "up_blocks.0"]; seed: not given -> 1' in told
    assert "or add --overwrite to replace it" in told
    assert (out / "probe.json").read_bytes() == first
    again = ["probe", "--config", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0
    assert (tmp_path / "again" / "probe.json").read_bytes() == first
    assert main([*command, "up_blocks.0", "--timesteps", "50", "--overwrite"]) == 0
    assert json.loads((out / "probe.json").read_text())["layers"] == ["up_blocks.0"]
    (out / "recipe.yaml").unlink()
    capsys.readouterr()
    assert main([*command, "up_blocks.0", "--timesteps", "50"]) == 2
    assert "no recipe.yaml that tells which command made it" in capsys.readouterr().err
    assert plan_upload(tmp_path / "again").left_out == ()  # it is not sent, and nobody is told


def test_recipes_of_before_still_read(tmp_path):
    def read(command, **recipe):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "m", "dataset": "d", "out": "o", **recipe}))
        return read_settings(command, ["--config", str(tmp_path / "recipe.yaml")])

    found = read("extract", layers=["a"], timestep=[10, 100], dtype="float16")
    assert (found.timesteps, found.store_dtype, found.dtype) == ([10, 100], "float16", "float32")
    found = read("extract", layers=["a"], timestep=10, dtype="float16", model_dtype="bfloat16")
    assert (found.timesteps, found.store_dtype, found.dtype) == ([10], "float16", "bfloat16")
    found = read("extract", layers=["a"], timesteps=10, dtype="bfloat16")
    assert (found.store_dtype, found.dtype) == ("float32", "bfloat16")
    assert read("probe", timestep=[5]).timesteps == [5]
    assert read("align", encoder="e", samples=7).limit == 7
    with pytest.raises(ValueError, match="has 'timestep' and 'timesteps', an earlier name of 'timesteps'"):
        read("probe", timestep=[5], timesteps=[6])


SHARED = {  # of one kind and one default wherever a command has it
    "timesteps": None, "seed": None, "dtype": "float32", "store_dtype": "float32", "batch_size": None, "device": None,
    "out": None, "overwrite": False, "json": False, "limit": None, "quiet": False, "dry_run": False, "revision": None,
}  # fmt: skip
HAVE = {
    "layers": "json revision", "extract": "timesteps seed dtype store_dtype batch_size device out overwrite limit",
    "assign": "seed dtype store_dtype batch_size device out overwrite quiet revision",
    "cache": "store_dtype batch_size device quiet", "convert": "out overwrite", "push": "dry_run",
    "publish": "dry_run",
    "select": "timesteps seed dtype batch_size device out overwrite json limit quiet",
    "probe": "timesteps seed dtype batch_size device out overwrite json limit quiet",
    "predict": "dtype batch_size device json limit",
    "match": "timesteps seed dtype batch_size device out overwrite json quiet revision",
    "segment fit": "timesteps seed dtype store_dtype batch_size device out overwrite json limit quiet",
    "segment predict": "dtype batch_size device out overwrite json limit quiet",
    "evaluate": "device out overwrite json quiet",
    "compare": "timesteps batch_size out json limit",
    "classify": "seed dtype batch_size device json",
    "segment open": "dtype batch_size device out overwrite json limit quiet",
    "generate": "batch_size device out overwrite quiet",
    "align": "timesteps seed dtype batch_size device out overwrite json limit quiet",
}  # fmt: skip


def test_flags_agree():
    hints = {}
    for command in COMMANDS:
        settings = command_module(command).Settings
        fields = {field.name: field for field in dataclasses.fields(settings)}
        assert set(HAVE[command].split()) <= set(fields), command
        assert not {"timestep", "samples", "model_dtype", "workers", "force", "output"} & set(fields), command
        for name, default in SHARED.items():
            if name in fields:
                kind = get_type_hints(settings)[name]
                kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
                hints.setdefault(name, set()).add(tuple(part for part in kinds if part is not type(None)))
                if default is not None:
                    assert fields[name].default == default, (command, name)
    assert {name for name, kinds in hints.items() if len(kinds) > 1} == set()


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
        (["probe", model, data, *out], "Give --layers and --timesteps, or --selection"),
        (["probe", model, data, "--layers", "mid_block", *out], "Give both --layers and --timesteps"),
        (["probe", model, data, "--layers", "mid", "--timesteps", "1", *out], "No layer 'mid'"),
        (["probe", model, data, "--layers", "mid_block", "--timesteps", "5000", *out], "5000"),
        (["probe", model, data, "--layers", "m", "--timesteps", "1", "--protocol", "x", *out], "Unknown protocol 'x'"),
        (["probe", model, image + "/x", "--layers", "mid_block", "--timesteps", "1", *out], "/x"),
        (["probe", probe, data, "--layers", "mid_block", "--timesteps", "1", *out], "is no pipeline folder"),
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
