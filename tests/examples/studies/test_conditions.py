"""The study of conditions: every kind of row, a few steps each, and that it goes on where it was."""

import json

import conditions
import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:UNet2DModel does not tell which class is the null one")
def test_a_short_run(tmp_path, monkeypatch):
    sizes = {"work": tmp_path / "work", "results": tmp_path / "results", "images": 80, "steps": 2}
    sizes |= {"max_train_steps": 4, "vector_steps": 4, "stage_steps": 2, "seeds": 0}
    flags = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    conditions.main(flags)
    rows = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {*conditions.RUNS, "RCG, vectors drawn"}
    assert all(("hits" in row) == (row["run"] != "RCG, vectors drawn") for row in rows)
    for name in ("samples", "clusters", "neighbours_knn", "neighbours_rdm"):
        assert (tmp_path / "results" / f"{name}.png").is_file()
    monkeypatch.setattr(conditions, "train_run", None)  # nothing is trained again
    monkeypatch.setattr(conditions, "trained", lambda name, seed, args: args.work / folder_of(name, seed))
    conditions.main(flags)
    assert len((tmp_path / "results" / "rows.jsonl").read_text().splitlines()) == len(rows)


def folder_of(name: str, seed: int) -> str:
    return f"{name.replace(' ', '-').replace(',', '')}-{seed}"
