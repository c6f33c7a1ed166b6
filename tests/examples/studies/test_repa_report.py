"""The report of the REPA study, from rows made up."""

import shlex

import pytest
import repa_report
from PIL import Image


def made_up(method, seed, step):
    worth = step * (2 if method == "repa" else 1) + seed
    return {"method": method, "seed": seed, "step": step, **dict.fromkeys(repa_report.COLUMNS, float(worth))}


ROWS = [made_up(m, seed, step) for m in ("baseline", "repa") for seed in (0, 1) for step in (100, 200, 300, 400)]


def test_means_and_ranges_at_the_middle_and_the_last_step():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in repa_report.table(ROWS).splitlines()[2:]]
    assert [line[:2] for line in lines] == [[step, m] for step in ("200", "400") for m in ("baseline", "repa")]
    means = {("200", "baseline"): 200.5, ("200", "repa"): 400.5, ("400", "baseline"): 400.5, ("400", "repa"): 800.5}
    for step, method, *cells in lines:
        mean = means[step, method]
        assert set(cells) == {f"{mean:g} ({mean - 0.5:g} to {mean + 0.5:g})"}


def test_the_page_has_the_command_and_the_differences(tmp_path):
    command = "python study.py --config a.yaml " + " ".join(f"--setting_{place} some_value" for place in range(9))
    facts = {"command": command, "device": "1 CPU thread", "samples": 500, "judge_accuracy": 0.99}
    repa_report.write_report(tmp_path, ROWS, {**facts, "distance_of_test_images": 0.1771}, "recipe: 1")
    page = (tmp_path / "README.md").read_text()
    block = page.split("```bash\n")[1].split("```")[0]
    assert shlex.split(block.replace("\\\n", " ")) == shlex.split(command)
    assert max(map(len, block.splitlines())) < 120
    assert "Fréchet distance +400, +400;" in page
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.mode == "P"
        assert curves.width == pytest.approx(350 * len(repa_report.CURVES), abs=2)
