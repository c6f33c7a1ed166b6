"""The study of scribbles: its rows are settings of the script, and its table is of the same seeds."""

import json
import warnings

import pytest
import scribbles as study

from diffusers_repr.config.recipe import read_recipe
from diffusers_repr.data.mixing import MixingConfig


@pytest.mark.parametrize("name", study.ROWS)
def test_rows_are_settings_that_the_script_knows(name):
    row = study.ROWS[name]
    MixingConfig(row.mixing, [f"variants-{ratio}" for ratio in row.ratios] or None)
    recipe = read_recipe(study.CONFIGS / "scribble_scenes.yaml")
    assert all(key in recipe and recipe[key] != value for key, value in row.changes)


def test_the_table_compares_equal_seeds_and_rows_of_other_settings_are_refused(tmp_path):
    line = {"images": 400, "test_images": 500, "steps": 9, "controlnet_steps": 2000, "guidance_scale": 2.0}
    lines = [
        {"row": row, "seed": seed, "mean_iou": iou, "pixel_accuracy": 0.9, **line}
        for row, seed, iou in (("real", 0, 0.2), ("real", 1, 0.4), ("append 1", 1, 0.5))
    ]
    told = study.table(lines, {"other_hint": 0.25})
    assert "other hint 0.2500." in told
    assert "| real | 0.300 ± 0.141 | 0.900 ± 0.000 |  | 2 |" in told
    assert "| append 1 | 0.500 | 0.900 | +0.100 | 1 |" in told
    (tmp_path / "rows.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="name another --results"):
        study.main(["--results", str(tmp_path), "--work", str(tmp_path / "work"), "--steps", "10"])


@pytest.mark.slow
def test_some_rows_at_toy_size(tmp_path, monkeypatch):
    asked = ["real", "append 1", "curriculum"]
    sizes = {"images": 4, "test_images": 2, "steps": 2, "controlnet_steps": 2, "inference_steps": 4}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--seeds", "0"]
    given = ["--train_batch_size", "2", "--checkpointing_steps", "2"]
    with warnings.catch_warnings():  # the ControlNet has hardly left its zeros
        warnings.simplefilter("ignore")
        study.main([*flags, "--rows", *asked, *given])
    lines = [json.loads(line) for line in (tmp_path / "results/rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == asked
    assert all(0 <= line["mean_iou"] <= 1 for line in lines)
    monkeypatch.setattr(study.Study, "measured", lambda *given: pytest.fail("a row that is there is measured anew"))
    study.main([*flags, "--rows", *asked])
    told = (tmp_path / "results/table.md").read_text()
    assert "| append 1 |" in told
    assert "other hint" in told
    assert study.Study(study.parsed(flags)).picture(0).height > 6 * 32  # scenes, scribbles, four ratios
