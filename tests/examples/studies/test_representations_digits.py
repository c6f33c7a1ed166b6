"""The study of representations: what stands on what, equal passes, the table; some steps of every row, slow."""

import functools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import representation_pictures
import representations_digits as study
import torch

from diffusers_repr.encoders import load_encoder
from diffusers_repr.sweep import ProbeSettings, measure_representation

LOADED = functools.cache(study.load_images)  # they take a second each time
TRAINED = [name for name, row in study.ROWS.items() if row.recipe]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(study, "load_images", LOADED)


@pytest.mark.parametrize("name", TRAINED)
def test_every_row_has_its_recipe_and_the_script_it_is_for(name):
    file = study.recipe_file(study.ROWS[name].recipe, name)
    assert (study.EXAMPLES / f"{study.script_of(file)}.py").is_file()
    for before in study.stages_before(file).values():
        assert study.recipe_file(before, name)


def test_what_stands_on_what_is_found_and_steps_are_equal_passes(tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    configs.mkdir()
    first = "# examples/train_first.py --config examples/configs/first_digits.yaml\noutput_dir: outputs/one\n"
    (configs / "first_digits.yaml").write_text(first + "train_batch_size: 100\n")
    then = "# examples/train_then.py --config examples/configs/then_digits.yaml\noutput_dir: outputs/two\n"
    then += "eval_split: test\n"
    (configs / "then_digits.yaml").write_text(then + "base: outputs/one\ntrain_batch_size: 10\n")
    monkeypatch.setattr(study, "CONFIGS", configs)
    file = configs / "then_digits.yaml"
    assert study.stages_before(file) == {"base": "first_digits"}
    assert study.script_of(file) == "train_then"
    made = study.Study(study.parsed(["--passes", "3", "--work", str(tmp_path / "work")]))
    assert (made.steps(configs / "first_digits.yaml"), made.steps(file)) == (30, 299)  # of 997 images
    with pytest.raises(study.MissingRecipe, match=r"row of none: there is no recipe none_digits.yaml"):
        made.trained("none_digits", 0, "row of none")

    ran = []

    def script(flags):
        ran.append(study.read_recipe(flags[1]))
        study.write_json(f"{ran[-1]['output_dir']}/made.json", {})

    for name in ("train_first", "train_then"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(main=script))
    folder = made.trained("then_digits", 5, "then")
    assert [told["train_batch_size"] for told in ran] == [100, 10]
    assert ran[1] == {
        "output_dir": str(folder), "base": str(tmp_path / "work" / "first_digits" / "seed-5"),
        "train_batch_size": 10, "seed": 5, "max_train_steps": 299,
    }  # fmt: skip
    assert made.cost(folder)["stages"] == 2
    third = tmp_path / "work" / "third"
    both = [str(tmp_path / "work" / name / "seed-5") for name in ("first_digits", "then_digits")]
    study.write_json(third / "study.json", {"steps": 7, "batch": 2, "cpu_seconds": 9.0, "before": both})
    cost = made.cost(third)
    seconds = [json.loads((study.Path(one) / "study.json").read_text())["cpu_seconds"] for one in both]
    assert (cost["steps"], cost["stages"], cost["cpu_seconds"]) == (7, 3, round(9 + sum(seconds), 1))  # each once
    made.trained("then_digits", 5, "then")
    assert len(ran) == 2  # it is there
    given = ["--passes", "3", "--train_batch_size", "20", "--work", str(tmp_path / "other")]
    other = study.Study(study.parsed(given))
    folder = other.trained("then_digits", 5, "then")
    assert [(told["train_batch_size"], told["max_train_steps"]) for told in ran[2:]] == [(20, 150)] * 2
    assert (other.cost(folder)["batch"], other.cost(folder)["steps"]) == (20, 150)


def test_the_table_shows_spread_and_the_untrained_network():
    lines = [
        {"row": "A", "seed": seed, "data": "digits", "passes": 80, "dim": 16, "steps": 10, "stages": 2, "batch": 4,
         "cpu_seconds": 60.4, "scores": {"linear": 0.9 + 0.02 * seed, "tad": 0.5}, "random": {"linear": 0.7, "tad": 9}}
        for seed in (0, 1)
    ]  # fmt: skip
    lines.append({"row": "raw pixels", "seed": 0, "data": "digits", "passes": 80, "dim": 64,
                  "scores": {"linear": 0.95}, "random": {}})  # fmt: skip
    head, _, first, last = study.table(lines).splitlines()
    assert head == "| | linear | numbers | TAD | CPU seconds | passes | seeds |"
    assert first == "| A | 0.910 ± 0.014 (0.700) | 16 | 0.500 ± 0.000 | 60 | 80 x 2 | 2 |"
    assert last == "| raw pixels | 0.950 | 64 |  |  | - | 1 |"


def test_attributes_of_a_digit_are_its_moments():
    data = study.load_images("digits", "test")
    found = study.digit_attributes(data)
    image = study.pixel_images(data, 1)[0, 0].double()
    ink = row = column = 0.0
    for y in range(8):
        for x in range(8):
            value = float(image[y, x])
            ink, row, column = ink + value, row + y * value, column + x * value
    row, column = row / ink, column / ink
    spread = sum(float(image[y, x]) * (y - row) ** 2 for y in range(8) for x in range(8)) / ink
    lean = sum(float(image[y, x]) * (x - column) * (y - row) for y in range(8) for x in range(8)) / ink
    wanted = {"ink": ink, "column": column, "row": row, "height": spread**0.5, "slant": lean / spread}
    assert {name: float(found[name][0]) for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["class"].dtype == torch.int64


def test_what_is_measured_is_kept_and_other_settings_are_refused(tmp_path, monkeypatch):
    told = {"dim": 64, "reads": "", "scores": {"linear": 0.5}, "random": {}}
    monkeypatch.setattr(study.Study, "of_pixels", lambda *_: told)
    command = ["--rows", "raw pixels", "--seeds", "0", "--work", str(tmp_path / "work"), "--train_images", "20"]
    command += ["--test_images", "20", "--results", str(tmp_path / "results")]
    study.main(command)
    (row,) = study.read_lines(tmp_path / "results" / "rows.jsonl")
    assert row == {"row": "raw pixels", "seed": 0, "data": "digits", "passes": 80, **told}
    assert "| raw pixels | 0.500 | 64 |" in (tmp_path / "results" / "table.md").read_text()
    monkeypatch.setattr(study.Study, "measured", lambda *_: pytest.fail("measured twice"))
    study.main(command)
    with pytest.raises(ValueError, match="name another --results"):
        study.main([*command, "--passes", "3"])
    with pytest.raises(ValueError, match="of the digits alone"):
        study.main([*command[2:], "--rows", "DiffAE", "--dataset_name", str(folder_of_images(tmp_path))])


def folder_of_images(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for at in range(10):
                Image.new("L", (8, 8), at).save(tmp_path / "images" / split / kind / f"{at}.png")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # two steps of training leave all sorts of them
@pytest.mark.timeout(1800)
def test_some_steps_of_every_row(tmp_path):
    work, results = tmp_path / "work", tmp_path / "results"
    command = ["--seeds", "0", "--work", str(work), "--results", str(results), "--steps", "2", "--samples", "70"]
    command += ["--train_images", "200", "--test_images", "70", "--finetune_epochs", "1", "--inference_steps", "2"]
    study.main(command)
    rows = {row["row"]: row for row in study.read_lines(results / "rows.jsonl")}
    assert list(rows) == list(study.ROWS)
    made = study.Study(study.parsed(command))
    for name in ("RepFusion", "l-DAE"):
        encoder = load_encoder(str(work / study.ROWS[name].recipe / "seed-0"))
        again = measure_representation(encoder, made.train, made.test, made.validation, beside=[],
                                       settings=ProbeSettings(("linear", "knn")))  # fmt: skip
        own = again.rows[encoder.name]
        assert {key: rows[name]["scores"][key] for key in own} == pytest.approx(own), name
    for name in ("DiffAE", "InfoDiffusion", "PDAE"):
        assert {"mse_inferred", "ssim_random", "feature_distance_random"} <= rows[name]["scores"].keys()
    for name in ("plain diffusion", "MAGE", "ADDP"):
        assert rows[name]["scores"]["frechet_record"]["counts"] == {"real": 200, "generated": 70}
    told = json.dumps(rows)
    assert str(tmp_path) not in told
    assert not re.search(r'"name": "/', told)
    pictures = {path.name for path in results.glob("*.png")}
    for wanted in ("diffae_back", "pdae_swaps", "infodiffusion_between", "mdm_masked", "mage_tokens", "curves",
                   "repfusion_levels", "diffae_edits"):  # fmt: skip
        assert f"{wanted}.png" in pictures
    assert representation_pictures.kind_of(work / "mage_digits" / "seed-0") == "TokenGenerationPipeline"
