"""The study of the perceptual loss's depth runs, and measures no row twice."""

import json

import perceptual_depth as study
import pytest


@pytest.mark.slow
def test_all_rows_at_toy_size(tmp_path, monkeypatch):
    flags = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--seeds", "0"]
    flags += ["--base_steps", "2", "--steps", "2", "--samples", "100"]
    study.main(flags)
    file = tmp_path / "results" / "perceptual_depth.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["base", *study.LAYERS, study.PLAIN]
    assert all(line["frechet"] > 0 and 0 <= line["accuracy"] <= 1 for line in lines)
    monkeypatch.setattr(study, "measured", lambda *given: pytest.fail("a row that is there is measured anew"))
    study.main(flags)
